"""``python -m scalegpt``: the same as the ``scalegpt`` command."""

from scalegpt.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit()
