"""A finished run of `clsl_jax.main`, for programs that ask its last state."""

import contextlib

from clsl_jax import experiment
from clsl_jax.checkpoint import Checkpointer
from clsl_jax.train_state import TrainState
from clsl_jax.workdir import Workdir


def last_state(workdir: str) -> tuple[experiment.Experiment, TrainState]:
    """Returns what a run was of, and its state at the newest sound checkpoint.

    Raises:
      InputError: there is no such run, it has saved nothing, or all of it is damaged.
    """
    config = Workdir.stored_config(workdir)
    built = experiment.build(config)
    checkpoints = Workdir(workdir).checkpoints(config)
    checkpointer = Checkpointer(checkpoints, keep=config.checkpoint.keep, read_only=True)
    with contextlib.closing(checkpointer):
        return built, checkpointer.restore_last(built.abstract_state)[0]
