"""Trains or evaluates one configuration.

python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR
python -m clsl_jax.main --config=configs/scenes.py --workdir=DIR --mode=evaluate
python -m clsl_jax.main --config=configs/voc.py:released --workdir=DIR --mode=evaluate \
    --weights=best_ema_model.pth --config.model.embeddings=labels.npz --config.data.dir=PREPARED

The last one evaluates a checkpoint of the CLSL authors' program.
Exit status: 0 done, or a training that SIGTERM stopped, with everything saved; 1 storage or workers
gave out (the same command goes on), or an error of the program; 2 input that cannot be used, or a
full disk; 143 an evaluation that SIGTERM stopped. A launcher that starts again only what has failed
tells the two meanings of 0 apart by --stopped_status. Ctrl-C does as SIGTERM; a second one ends it
at once.
"""

import os
import signal
import traceback
from collections.abc import Sequence

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
    flags.DEFINE_integer("stopped_status", 0, "Exit status where SIGTERM stopped it.", 0, 255)
    flags.DEFINE_string("weights", None, "evaluate: a torch checkpoint instead of the run's own.")


def work(arguments: Sequence[str]) -> int | None:
    """Does what the flags say and returns the exit status; None is 0."""
    values = flags.FLAGS
    command_line.refuse_arguments(arguments)
    if not values.workdir:
        raise InputError("--workdir=DIR is missing: where shall the run live?")
    config = command_line.given_config(values)
    if values.weights and (values.mode != "evaluate" or config is None):
        raise InputError("--weights=FILE goes with --mode=evaluate and --config=FILE.")
    if values.mode == "train" and config is None:
        raise InputError("--config=FILE is missing, such as configs/scenes.py.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not values.distributed:
        return _run(values, config)
    # Here, so that wrong flags are answered before JAX has started.
    from clsl_jax import cluster

    cluster.join()
    try:
        return _run(values, config)
    except InputError as error:
        command_line.refuse(str(error))
        cluster.leave(error.status)
    except Exception:
        traceback.print_exc()
        cluster.leave(1)


def _run(values: flags.FlagValues, config: ml_collections.ConfigDict | None) -> int | None:
    from clsl_jax import cluster, torch_checkpoint, train

    cluster.meet("has started")
    if values.weights:
        torch_checkpoint.evaluate_checkpoint(config, values.workdir, values.weights)
        return None
    evaluates = values.mode == "evaluate"
    command = train.evaluate_only if evaluates else train.train_and_evaluate
    if command(config, values.workdir) is not None:
        return None
    return values.stopped_status or (128 + signal.SIGTERM if evaluates else 0)


def cli() -> None:
    """Entry point of the console script."""
    explain = command_line.explain_config(config_lib.base_config, file="clsl_jax/config.py")
    command_line.run(define_flags, work, explain=explain)


if __name__ == "__main__":
    cli()
