"""The dialogue of ``scalegpt sample``: a prompt is typed, its continuation appears, and so on."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from scalegpt.cli.output import note
from scalegpt.cli.sample.printing import print_text
from scalegpt.errors import InputError

if TYPE_CHECKING:
    from scalegpt.inference.continuations import Part

ASK = "> "
BANNER = "type a prompt; Ctrl-C stops a continuation, an empty line or Ctrl-D ends"


def converse(continue_prompt: Callable[[str, int], Iterator["Part"]], num_samples: int) -> None:
    """Ask for prompts and print their continuations, until an empty line or the end of standard input.

    Ctrl-C stops a continuation, or drops the prompt that is being typed. On a terminal, lines can be edited, and
    earlier lines can be recalled.

    Args:
        continue_prompt: a function from a prompt, and the number of continuations drawn before, to the parts of its
            continuations.
        num_samples: continuations of each prompt.
    """
    with suppress(ImportError):  # Python can be built without it; then a line cannot be edited
        import readline  # noqa: F401 - input() uses it once it is imported
    note(f"scalegpt sample: {BANNER}")
    drawn = 0
    while True:
        try:
            prompt = input(ASK)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            note(f"scalegpt sample: that line is not valid {error.encoding}; type it again")
            continue
        if not prompt:
            return
        try:
            print_text([""] * num_samples, continue_prompt(prompt, drawn))
        except KeyboardInterrupt:
            print()
        except InputError as error:  # such as a character that the vocabulary lacks
            note(f"scalegpt sample: {error}")
        drawn += num_samples
