"""The directory of a run: one run at a time, one configuration, one known-label mask."""

import contextlib
import fcntl
import os
from collections.abc import Sequence
from typing import IO

import jax
import ml_collections
import numpy as np
from absl import logging

from clsl_jax import atomic, cluster, npz
from clsl_jax import config as config_lib
from clsl_jax.data import partial
from clsl_jax.errors import InputError, writing, writing_to

CONFIG_NAME = "config.json"
MASK_NAME = "known_mask.npz"
EMBEDDINGS_NAME = "label_embeddings.npz"


class Workdir:
    """Files of a run. As a context manager it holds the directory against a second run."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._locks = contextlib.ExitStack()

    def path(self, *names: str) -> str:
        """Returns the path of something in the directory."""
        return os.path.join(self._directory, *names)

    def checkpoints(self, config: ml_collections.ConfigDict) -> str:
        """Returns the directory, or the bucket, that a run of this configuration saves to."""
        return config.checkpoint.dir or self.path("checkpoints")

    def __enter__(self) -> "Workdir":
        with contextlib.ExitStack() as locks:
            cluster.agree(lambda: self._take(locks))
            self._locks = locks.pop_all()
        return self

    def _take(self, locks: contextlib.ExitStack) -> None:
        with writing_to(self._directory):
            os.makedirs(self._directory, exist_ok=True)
            if jax.process_index() != 0:
                return
            lock = locks.enter_context(_lock_file(self._directory, ".lock"))
        try:
            _hold(
                lock,
                f"Another process is running in --workdir={self._directory}: wait for it, "
                "stop it, or name another directory.",
            )
        except OSError as error:
            raise InputError(
                f"--workdir={self._directory} is on a file system without locks "
                f"({error.strerror}), so that two runs could write there at once: name a "
                "directory on another, or have it mounted with them (Lustre: -o flock)."
            ) from None

    def __exit__(self, *unused: object) -> None:
        self._locks.close()

    def hold_checkpoints(self, directory: str) -> None:
        """Holds a directory of checkpoints against runs of other workdirs, as long as the workdir.

        A bucket, or a directory on a file system without locks, is not held; of the latter it
        warns.

        Raises:
          InputError: another run holds it, or it cannot be written to.
        """
        if "://" not in directory:
            cluster.agree(lambda: self._take_checkpoints(directory))

    def _take_checkpoints(self, directory: str) -> None:
        if jax.process_index() != 0:
            return
        with writing(directory, ": name another directory by --config.checkpoint.dir"):
            os.makedirs(directory, exist_ok=True)
            # Not named as the workdir's own, which may be in the same directory.
            lock = self._locks.enter_context(_lock_file(directory, ".checkpoints.lock"))
        try:
            _hold(
                lock,
                f"Another process keeps its checkpoints in {directory}: wait for it, stop it, or "
                "name another directory by --config.checkpoint.dir.",
            )
        except OSError as error:
            logging.warning(
                "%s is on a file system without locks (%s): nothing keeps a second run from saving "
                "its checkpoints there, too. Give each run a --config.checkpoint.dir of its own.",
                directory,
                error.strerror,
            )

    def check(self, config: ml_collections.ConfigDict) -> None:
        """Checks the configuration against the one that the run here was started with, if any.

        Raises:
          InputError: if it was started with another one, naming the keys.
        """
        if os.path.exists(self.path(CONFIG_NAME)):
            stored = self.stored_config(self._directory)
            config_lib.check_resume(stored, config, self._directory)

    def adopt(self, config: ml_collections.ConfigDict) -> None:
        """Writes the configuration down: from now on the directory is of this run."""
        if jax.process_index() == 0:
            atomic.write_text(self.path(CONFIG_NAME), config_lib.to_json(config))

    @staticmethod
    def stored_config(directory: str) -> ml_collections.ConfigDict:
        """Returns the configuration of the run in `directory`.

        Raises:
          InputError: if there is no run or its configuration is damaged.
        """
        path = os.path.join(directory, CONFIG_NAME)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            raise InputError(
                f"There is no run in --workdir={directory} (no {CONFIG_NAME}): train there first."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}). Restore it or use a new workdir."
            ) from None
        return config_lib.from_json(text, path)

    def save_mask(self, mask: np.ndarray, config: ml_collections.ConfigDict) -> str:
        """Writes the known-label mask bool [N, C] and returns its SHA-256."""
        if jax.process_index() != 0:
            return partial.matrix_sha256(mask)
        facts = {"protocol": config.labels.protocol, "seed": config.labels.seed}
        if config.labels.protocol in partial.BY_FRACTION:
            facts["known_fraction"] = config.labels.known_fraction
        return partial.save_mask(self.path(MASK_NAME), mask, **facts)

    def save_embeddings(self, embeddings: np.ndarray, class_names: Sequence[str]) -> None:
        """Keeps the label embeddings float32 [C, E] that the run starts with."""
        path = self.path(EMBEDDINGS_NAME)
        if jax.process_index() == 0 and not os.path.exists(path):
            names = np.asarray(class_names, np.str_)
            npz.write(path, {"embeddings": embeddings, "class_names": names})


def _lock_file(directory: str, name: str) -> IO[str]:
    return open(os.path.join(directory, name), "a", encoding="utf-8")


def _hold(lock: IO[str], taken: str) -> None:
    """Holds an open file; the system lets go when the process ends, however it ends.

    Raises:
      InputError: another process holds it, which `taken` says.
      OSError: the file system has no locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(taken) from None
