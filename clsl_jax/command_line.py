"""What the commands share: flags, and one message with exit status 2 for unusable input."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from clsl_jax import config as config_lib
from clsl_jax.errors import InputError, Stuck

EXIT_BAD_INPUT = 2

Explain = Callable[[Exception, Sequence[str]], str | None]


def console(**options: Any) -> Console:
    """Returns what prints text as it is: names of classes and files may look like markup."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def run(
    define_flags: Callable[[], None],
    work: Callable[[Sequence[str]], int | None],
    *,
    explain: Explain = lambda error, argv: None,
) -> None:
    """Runs a command and ends the program.

    Args:
      define_flags: defines the command's flags.
      work: does it, given the arguments that are no flags, and returns the exit status (None: 0);
        an `InputError` that it raises is printed without a traceback, and the exit status is 2.
      explain: `explain(error, argv)` gives a better message for an error in reading the flags, or
        None: then absl's own errors speak for themselves and others keep their traceback.
    """

    def main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        try:
            return work(argv[1:])
        except InputError as error:
            status = refuse(str(error))
            if isinstance(error, Stuck):
                sys.stdout.flush()
                os._exit(status)
            return status

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(list(argv))
        except Exception as error:  # a configuration file may raise anything
            message = explain(error, argv)
            if message is None and isinstance(error, (flags.Error, InputError)):
                message = str(error)
            if message is None:
                raise
        raise SystemExit(refuse(message))

    define_flags()
    app.run(main, flags_parser=parse)


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raises InputError if a command that takes flags alone was given anything else."""
    if arguments:
        raise InputError(f"Unexpected argument {arguments[0]!r}: write --flag=value.")


def require(values: flags.FlagValues, name: str, kind: str, what: str) -> None:
    """Raises InputError if a flag was not given; `kind` as in --out=FILE, `what` in words."""
    if not values[name].value:
        raise InputError(f"--{name}={kind} is missing: {what}.")


def refuse_foreign(
    values: flags.FlagValues, by: str, belongs_to: Mapping[str, Sequence[str]]
) -> None:
    """Raises InputError if a flag was given that means nothing with the value of the flag `by`.

    Args:
      values: of all flags.
      by: the flag that the others depend on.
      belongs_to: values of `by` with which each of the other flags has a meaning.
    """
    for name, choices in belongs_to.items():
        if values[name].present and values[by].value not in choices:
            raise InputError(
                f"--{name} has no meaning with --{by}={values[by].value}; it belongs to "
                f"{', '.join(choices)}."
            )


def check_place(path: str) -> None:
    """Refuses a place that no file can be written to, before any work is done.

    Raises:
      InputError: it has no folder, is a folder, or is not writable.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InputError(f"{path} cannot be written: there is no folder {folder}; make it first.")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        what = "it is a folder" if os.path.isdir(path) else f"{folder} is not writable for you"
        raise InputError(f"{path} cannot be written: {what}; name another place.")


def given_config(values: flags.FlagValues) -> ml_collections.ConfigDict | None:
    """Returns what --config=FILE gives; None without that flag.

    Raises:
      InputError: there is no such file, or it gives something else.
    """
    config = values.config
    if config is None or isinstance(config, ml_collections.ConfigDict):
        return config
    # What ml_collections gives for a file that is not there; any use of it raises.
    what = "there is no such file"
    if isinstance(config, (Mapping, list, tuple, str, int, float)):
        what = f"get_config() returns a {type(config).__name__}, expected a ConfigDict"
    raise InputError(f"--config={values['config'].config_filename}: {what}.")


def config_of(arguments: Sequence[str]) -> ml_collections.ConfigDict | None:
    """Returns what a command would be configured to by the arguments --config and --config.KEY.

    Raises:
      InputError: as `given_config`; a value that a key cannot have.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise InputError(str(error)) from None
    return given_config(values)


def explain_config(base: Callable[[], ml_collections.ConfigDict], *, file: str) -> Explain:
    """Returns the `explain` of a command whose --config has the keys of `base()`; see `file`."""

    def explain(error: Exception, argv: Sequence[str]) -> str | None:
        if isinstance(error, (OSError, SyntaxError, ImportError)):
            return f"The configuration file cannot be read: {error}"
        if "Traceback" in str(error):  # raised inside the configuration file
            kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
            if kind.endswith(("ConfigError", "InputError")):
                return message
            return f"{_config_file(argv)}: {kind}: {message}"
        if isinstance(error, (AttributeError, LookupError, TypeError, ValueError)):
            if unknown := _unknown_key(argv, base(), file):
                return unknown
            if isinstance(error, ValueError):  # of absl, such as --noflag=value
                return str(error)
            if isinstance(error, (AttributeError, KeyError)):
                return f"{_config_file(argv)} cannot be used: {type(error).__name__}: {error}"
        return None

    return explain


def _config_file(argv: Sequence[str]) -> str:
    return next((a.lstrip("-") for a in argv if a.lstrip("-").startswith("config=")), "--config")


def _unknown_key(argv: Sequence[str], base: ml_collections.ConfigDict, file: str) -> str | None:
    """Returns the message for the first override of a key that does not exist, if there is one."""
    known = config_lib.flatten(base)
    for argument in argv:
        _, found, key = argument.split("=", 1)[0].partition("config.")
        if found and key not in known:
            return config_lib.unknown_key_message(key, base, file=file)
    return None


def refuse(message: str) -> int:
    """Says why the input cannot be used; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT
