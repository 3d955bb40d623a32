"""What the commands share: flags, how they end, one message with status 2 for unusable input."""

import contextlib
import itertools
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from clsl_jax import atomic
from clsl_jax import config as config_lib
from clsl_jax.errors import InputError, Unavailable

_ELSEWHERE = "name another place"
# What a run keeps in its directory, and nothing else may replace.
_OF_A_RUN = (
    "config.json",
    "evaluation.json",
    "known_mask.npz",
    "label_embeddings.npz",
    "log.jsonl",
    "pictures.png",
    "predictions.npz",
    "probabilities.csv",
    "recovered.csv",
    "results.json",
    "timing.jsonl",
)

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

    Ctrl-C ends it with one line and status 130; a reader of its output that has gone, as in
    `... | head`, with none. In --flag=~/PLACE the home directory is filled in.

    Args:
      define_flags: defines the command's flags.
      work: does it, given the arguments that are no flags, and returns the exit status (None: 0);
        an `InputError` that it raises is printed without a traceback, and the exit status is its.
      explain: `explain(error, argv)` gives a better message for an error in reading the flags, or
        None: then absl's own errors speak for themselves and others keep their traceback.
    """

    def main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        try:
            return work(argv[1:])
        except InputError as error:
            refuse(str(error))
            if isinstance(error, Unavailable):
                sys.stdout.flush()
                os._exit(error.status)
            return error.status

    def parse(argv: Sequence[str]) -> list[str]:
        argv = [argv[0], *map(_at_home, argv[1:])]
        try:
            return flags.FLAGS(argv)
        except BrokenPipeError:  # of what --help prints
            raise
        except Exception as error:  # a configuration file may raise anything
            message = explain(error, argv)
            if message is None and isinstance(error, (flags.Error, InputError)):
                message = str(error)
            if message is None:
                raise
        raise SystemExit(refuse(message))

    define_flags()
    with _ended_from_outside():
        app.run(main, flags_parser=parse)


@contextlib.contextmanager
def _ended_from_outside() -> Iterator[None]:
    """Ends the program without a traceback where Ctrl-C or a closed pipe ends what it does."""
    code: Any = None
    try:
        try:
            yield
        except SystemExit as ended:
            code = ended.code
            print(end="", flush=True)  # here, where it can still be said that nobody reads it
            raise
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        with contextlib.suppress(OSError):
            print("Stopped by Ctrl-C.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # `sys.exit` would wait for threads that are at work
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os._exit(code or 1)  # `sys.exit` would try to write again


def _nobody_reads() -> bool:
    """Returns whether the other end of the standard output's pipe is closed."""
    poll = select.poll()
    poll.register(1, 0)  # for errors alone
    return bool(poll.poll(0))


def _at_home(argument: str) -> str:
    """Fills in the home directory in --flag=~/PLACE, which shells leave as it is."""
    name, given, value = argument.partition("=")
    if name.startswith("-") and value.startswith("~") and "/" in value:
        value = os.path.expanduser(value)
    return name + given + value


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


def check_outputs(
    values: flags.FlagValues, endings: Mapping[str, str], *, inputs: Sequence[str] = ()
) -> None:
    """Refuses files to write that cannot be, or would replace something, before any work is done.

    What an earlier call wrote is replaced. A link stays, and the file that it leads to is replaced.

    Args:
      values: of all flags.
      endings: flags that name files to write, if they are given, and how those files end that may
        be replaced; one without an ending may be, too.
      inputs: files that the command reads.

    Raises:
      InputError: a file has no folder, is no plain file, is there under another ending, must not
        be written to, or is an input, another output, a run's own, or where the command prints.
    """
    taken = dict.fromkeys(map(_identity, inputs), f"this command reads it; {_ELSEWHERE}")
    for stream in ("/dev/stdout", "/dev/stderr"):
        taken[_identity(stream)] = f"what this command prints goes there; {_ELSEWHERE}"
    for name, ending in endings.items():
        path = values[name].value
        if not path:
            continue
        fault = _fault(path, ending) or taken.get(_identity(path))
        if fault:
            raise InputError(f"--{name}={path} cannot be written: {fault}.")
        taken[_identity(path)] = f"--{name} is written there; {_ELSEWHERE}"


def _fault(path: str, ending: str) -> str | None:
    """Returns why no file can be written to a place; None if one can."""
    folder = os.path.dirname(atomic.target(path)) or "."
    given = os.path.splitext(path)[1]
    if not os.path.isdir(folder):
        return f"there is no folder {folder}; make it first"
    if os.path.isdir(path):
        return f"it is a folder; {_ELSEWHERE}"
    if os.path.exists(path) and not os.path.isfile(path):
        return f"it is a device or a pipe; {_ELSEWHERE}"
    if os.path.isfile(path) and given.lower() not in ("", ending):
        return f"it is there and ends in {given}, not {ending}; {_ELSEWHERE}"
    if os.path.basename(path) in _OF_A_RUN and os.path.exists(os.path.join(folder, "config.json")):
        return f"it is of the run in {folder}; {_ELSEWHERE}"
    if not os.access(folder, os.W_OK):
        return f"{folder} is not writable for you; {_ELSEWHERE}"
    # For root everything is writable; who took that away meant the file to stay.
    if os.path.isfile(path) and not (os.access(path, os.W_OK) and os.stat(path).st_mode & 0o222):
        return f"it is protected against writing; {_ELSEWHERE}"
    return None


def _identity(path: str) -> Any:
    """Returns the same for all names of a file, those of one that is not there yet, too."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def given_config(values: flags.FlagValues) -> ml_collections.ConfigDict | None:
    """Returns what --config=FILE gives; None without that flag.

    Raises:
      InputError: there is no such file, or it gives something else.
    """
    config = values.config
    if config is None or isinstance(config, ml_collections.ConfigDict):
        return config
    name = values["config"].config_filename
    try:
        getattr(config, "keys", None)  # of what stands for a file that was not loaded, this raises
    except OSError as error:
        raise InputError(_not_loaded(name, error)) from None
    kind = type(config).__name__
    raise InputError(f"--config={name}: get_config() returns a {kind}, expected a ConfigDict.")


def _not_loaded(name: str, error: OSError) -> str:
    """Returns the message for a --config=FILE that ml_collections could not load."""
    place = name.partition(":")[0]
    if os.path.isfile(place):
        return f"--config={name} cannot be loaded: {error.__cause__ or error}"
    where = "" if os.path.isabs(place) else f" in {os.getcwd()}"
    return (
        f"--config={name}: there is no such file{where}; run the command in the repository, or "
        "give the full path of the file."
    )


def config_of(arguments: Sequence[str]) -> ml_collections.ConfigDict | None:
    """Returns what a command would be configured to by the arguments --config and --config.KEY.

    Raises:
      InputError: as `given_config`; a value that a key cannot have.
    """
    values, argv = flags.FlagValues(), ["", *map(_at_home, arguments)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except OSError as error:
        raise InputError(_not_loaded(_config_file(argv), error)) from None
    except flags.Error as error:
        raise InputError(str(error)) from None
    return given_config(values)


def explain_config(base: Callable[[], ml_collections.ConfigDict], *, file: str) -> Explain:
    """Returns the `explain` of a command whose --config has the keys of `base()`; see `file`."""

    def explain(error: Exception, argv: Sequence[str]) -> str | None:
        if isinstance(error, OSError):
            return _not_loaded(_config_file(argv), error)
        if isinstance(error, (SyntaxError, ImportError)):
            return f"The configuration file cannot be read: {error}"
        if "Traceback" in str(error):  # raised inside the configuration file
            kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
            if kind.endswith(("ConfigError", "InputError")):
                return message
            return f"--config={_config_file(argv)}: {kind}: {message}"
        if isinstance(error, (AttributeError, LookupError, TypeError, ValueError)):
            if unknown := _unknown_key(argv, base(), file):
                return unknown
            if isinstance(error, ValueError):  # of absl, such as --noflag=value
                return str(error)
            if isinstance(error, (AttributeError, KeyError)):
                name = _config_file(argv)
                return f"--config={name} cannot be used: {type(error).__name__}: {error}"
        return None

    return explain


def _config_file(argv: Sequence[str]) -> str:
    """Returns the FILE of --config=FILE, or of --config FILE."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, given, value = argument.partition("=")
        if name in ("-config", "--config"):
            return value if given else following
    return ""


def _unknown_key(argv: Sequence[str], base: ml_collections.ConfigDict, file: str) -> str | None:
    """Returns the message for the first override of a key that does not exist, if there is one."""
    known = config_lib.flatten(base)
    for argument in argv:
        name = argument.split("=", 1)[0]
        given = re.fullmatch(r"--?(?:no)?config\.(.*)", name, re.DOTALL)
        if given and given[1] not in known:
            return config_lib.unknown_key_message(given[1], base, file=file)
    return None


def refuse(message: str) -> int:
    """Says why the input cannot be used; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return InputError.status
