"""What the small commands share: flags, and one message with exit status 2 for unusable input."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from clsl_jax.errors import InputError

EXIT_BAD_INPUT = 2


def run(define_flags: Callable[[], None], work: Callable[[Sequence[str]], None]) -> None:
    """Runs a command and ends the program.

    Args:
      define_flags: defines the command's flags.
      work: does it, given the arguments that are no flags; an `InputError` that it raises is
        printed without a traceback, and the exit status is 2.
    """

    def main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        try:
            work(argv[1:])
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        return None

    define_flags()
    app.run(main, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
