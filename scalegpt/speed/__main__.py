"""``python -m scalegpt.speed``: measure the processor, and print its rates as JSON."""

from scalegpt.speed.rates import main

if __name__ == "__main__":
    main()
