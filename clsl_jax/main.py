"""Trains or evaluates one configuration.

python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR
python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR --mode=evaluate

Exit status: 0 done, or stopped by SIGTERM with everything saved; 2 input that cannot be used.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from clsl_jax import config as config_lib
from clsl_jax.errors import InputError

EXIT_BAD_INPUT = 2
_MODES = ("train", "evaluate")


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run; made if it does not exist.")
    flags.DEFINE_enum("mode", "train", _MODES, "What to do.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it ends the program with one message."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        message = str(error)
    except (AttributeError, KeyError):
        message = _unknown_key(argv)
    except (OSError, SyntaxError, ImportError) as error:
        message = f"The configuration file cannot be read: {error}"
    except InputError as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT)


def _unknown_key(argv: Sequence[str]) -> str:
    keys = [a.lstrip("-").split("=", 1)[0][len("config.") :] for a in argv if "config." in a]
    base = config_lib.base_config()
    known = config_lib.flatten(base)
    for key in keys:
        if key not in known:
            return config_lib.unknown_key_message(key, base)
    return "The configuration cannot be read; see clsl_jax/config.py for its keys."


def main(argv: Sequence[str]) -> int | None:
    """Runs the command; input that cannot be used gives one message and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    # Here, so that a wrong flag is answered before JAX has started.
    from clsl_jax import train

    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument {argv[1]!r}: write --flag=value.")
        if not values.workdir:
            raise InputError("--workdir=DIR is missing: where shall the run live?")
        if values.mode == "evaluate":
            train.evaluate_only(values.config, values.workdir)
        elif values.config is None:
            raise InputError("--config=FILE is missing, such as configs/scenes.py.")
        else:
            train.train_and_evaluate(values.config, values.workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return None


def cli() -> None:
    """Entry point of the console script."""
    define_flags()
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    cli()
