"""What the commands share: flags, and one message with exit status 2 for unusable input."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from clsl_jax.errors import InputError

EXIT_BAD_INPUT = 2

Explain = Callable[[Exception, Sequence[str]], str | None]


def run(
    define_flags: Callable[[], None],
    work: Callable[[Sequence[str]], None],
    *,
    explain: Explain = lambda error, argv: None,
) -> None:
    """Runs a command and ends the program.

    Args:
      define_flags: defines the command's flags.
      work: does it, given the arguments that are no flags; an `InputError` that it raises is
        printed without a traceback, and the exit status is 2.
      explain: `explain(error, argv)` gives a better message for an error in reading the flags, or
        None: then absl's own errors speak for themselves and others keep their traceback.
    """

    def main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        try:
            work(argv[1:])
        except InputError as error:
            return _refuse(str(error))
        return None

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(list(argv))
        except Exception as error:  # a configuration file may raise anything
            message = explain(error, argv)
            if message is None and isinstance(error, (flags.Error, InputError)):
                message = str(error)
            if message is None:
                raise
        raise SystemExit(_refuse(message))

    define_flags()
    app.run(main, flags_parser=parse)


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raises InputError if a command that takes flags alone was given anything else."""
    if arguments:
        raise InputError(f"Unexpected argument {arguments[0]!r}: write --flag=value.")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT
