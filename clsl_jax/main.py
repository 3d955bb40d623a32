"""Trains or evaluates one configuration.

python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR
python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR --mode=evaluate
python -m clsl_jax.main --config=configs/voc.py:released --workdir=DIR --mode=evaluate \
    --weights=best_ema_model.pth --config.model.embeddings=labels.npz --config.data.dir=PREPARED

The last one evaluates a checkpoint of the CLSL authors' program.
Exit status: 0 done, or stopped by SIGTERM with everything saved; 2 input that cannot be used.
"""

import os
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from clsl_jax import command_line
from clsl_jax import config as config_lib
from clsl_jax.errors import InputError

_MODES = ("train", "evaluate")


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run; made if it does not exist.")
    flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
    flags.DEFINE_bool("distributed", False, "Join the other processes that train this run.")
    flags.DEFINE_string("weights", None, "evaluate: a torch checkpoint instead of the run's own.")


def _explain(error: Exception, argv: Sequence[str]) -> str | None:
    """Returns the message for an error in reading the configuration."""
    if isinstance(error, (OSError, SyntaxError, ImportError)):
        return f"The configuration file cannot be read: {error}"
    if "Traceback" in str(error):  # raised inside the configuration file
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        return (
            message
            if kind.endswith(("ConfigError", "InputError"))
            else f"{_file(argv)}: {kind}: {message}"
        )
    if isinstance(error, (AttributeError, LookupError, TypeError, ValueError)):
        if unknown := _unknown_key(argv):
            return unknown
        if isinstance(error, ValueError):  # of absl, such as --noflag=value
            return str(error)
        if isinstance(error, (AttributeError, KeyError)):
            return f"{_file(argv)} cannot be used: {type(error).__name__}: {error}"
    return None


def _file(argv: Sequence[str]) -> str:
    return next((a.lstrip("-") for a in argv if a.lstrip("-").startswith("config=")), "--config")


def _unknown_key(argv: Sequence[str]) -> str | None:
    """Returns the message for the first override of a key that does not exist, if there is one."""
    base = config_lib.base_config()
    known = config_lib.flatten(base)
    for argument in argv:
        _, found, key = argument.split("=", 1)[0].partition("config.")
        if found and key not in known:
            return config_lib.unknown_key_message(key, base)
    return None


def work(arguments: Sequence[str]) -> None:
    """Does what the flags say."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Here, so that a wrong flag is answered before JAX has started.
    from clsl_jax import cluster, torch_checkpoint, train

    values = flags.FLAGS
    if values.distributed:
        cluster.join()
    command_line.refuse_arguments(arguments)
    if not values.workdir:
        raise InputError("--workdir=DIR is missing: where shall the run live?")
    config = values.config
    if not (config is None or isinstance(config, ml_collections.ConfigDict)):
        # What ml_collections gives for a file that is not there; any use of it raises.
        what = "there is no such file"
        if isinstance(config, (Mapping, list, tuple, str, int, float)):
            what = f"get_config() returns a {type(config).__name__}, expected a ConfigDict"
        raise InputError(f"--config={values['config'].config_filename}: {what}.")
    if values.weights and (values.mode != "evaluate" or config is None):
        raise InputError("--weights=FILE goes with --mode=evaluate and --config=FILE.")
    if values.weights:
        torch_checkpoint.evaluate_checkpoint(config, values.workdir, values.weights)
    elif values.mode == "evaluate":
        train.evaluate_only(config, values.workdir)
    elif config is None:
        raise InputError("--config=FILE is missing, such as configs/scenes.py.")
    else:
        train.train_and_evaluate(config, values.workdir)


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, work, explain=_explain)


if __name__ == "__main__":
    cli()
