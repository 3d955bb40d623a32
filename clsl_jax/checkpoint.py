"""Checkpoints by Orbax: saved whole or not at all, verified when read, older ones as a fallback.

The position of the input pipeline needs no file of its own: the order of examples is a function of
the seed and the step, so `state.step` is its state, on any number of processes.
"""

import contextlib
import errno
import functools
import itertools
import json
import logging as stdlib_logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from clsl_jax import cluster, sharding
from clsl_jax.errors import PASSING, InputError, Unavailable, first_line, may_pass

FORMAT_VERSION = 6
# A checkpoint whose step is being saved again, until that is whole.
_REPLACED = "replaced-"
# Devices share the writing of a replicated array of which each host then writes so many bytes or
# more. By Orbax's default they share every array that they can divide, even a bias: a slice and an
# entry for each device.
LEAST_SHARE = 2**20
# In an abstract state: in place of an array that is not to be read.
LEFT_OUT = ocp.PLACEHOLDER


class _OneMessage(stdlib_logging.Filter):
    """Keeps Orbax from printing: tracebacks of a failed save, which is told in a line anyway, and
    that what is only read is not written."""

    def filter(self, record: stdlib_logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


_ONE_MESSAGE = _OneMessage()


class CheckpointError(InputError):
    """No usable checkpoint; the message says where and what to do."""


class SaveError(CheckpointError):
    """A checkpoint could not be saved; `reason` is why, in the system's words if it has any."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(f"{message}: {reason}.")
        self.reason = reason


def checksums(state: Any) -> list[int]:
    """Returns a checksum of each array of a tree, whatever its sharding.

    The words of its bytes are summed modulo 2**32, each weighted by its odd place number, so that a
    changed, missing or moved value changes the sum. Integer sums do not depend on the order of
    devices.
    """
    leaves = jax.tree.leaves(state)
    checksum = _compiled_checksum(leaves[0].sharding.mesh)
    # Each is waited for: the devices of a CPU can take up the collectives of several programs in
    # different orders, and then wait for one another for ever.
    return [int(checksum(leaf)) for leaf in leaves]


@functools.cache
def _compiled_checksum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    # The many arrays of a state are of few shapes, of which each is compiled once, whatever else is
    # saved or restored with it.
    return jax.jit(_checksum, out_shardings=sharding.replicated(mesh))


def _checksum(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Place numbers by axis: no flattening, which would gather a sharded matrix.
    place = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(length) + along
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _agreed(read: Callable[[], Any], unusable: str) -> Any:
    """Returns `read()`; all processes go on from a checkpoint, or none."""

    def tried() -> Any:
        try:
            return read()
        except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
            if _may_pass(error):
                raise Unavailable(
                    f"{unusable} now: {_reason(error)}. Run the same command again."
                ) from error
            raise CheckpointError(f"{unusable}: {_reason(error)}") from error

    try:
        return cluster.agree(tried)
    except (CheckpointError, Unavailable):
        raise
    except InputError as error:  # of another process
        raise CheckpointError(f"{unusable}: {error}") from error


class Checkpointer:
    """Saves and restores train states under `directory`.

    Keeps the `keep` latest and the one with the highest `selection` metric. Devices share the
    writing of replicated arrays of which each host then writes `least_share` bytes or more.

    Raises:
      CheckpointError: nothing can be kept there.
      Unavailable: or not now.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int = 2,
        read_only: bool = False,
        least_share: int = LEAST_SHARE,
    ) -> None:
        # A bucket (gs://...) is no path of this machine.
        bucket = "://" in directory
        directory = directory if bucket else os.path.abspath(directory)
        self._pending: int | None = None
        self._read_only = read_only
        stdlib_logging.getLogger("absl").addFilter(_ONE_MESSAGE)
        stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
        best = preservation_policy.BestN(
            get_metric_fn=_selection, n=1, keep_checkpoints_without_metrics=False
        )
        latest = preservation_policy.LatestN(max(2, keep))
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            best_fn=_selection,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        array_handler = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=least_share // jax.local_device_count()
        )
        state_handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, array_handler)
            )
        )
        try:
            self._directory = epath.Path(directory)
            cluster.agree(self._tidy)
            cluster.agree(self._look_at_metrics)
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=options,
                handler_registry=ocp.handlers.create_default_handler_registry(state=state_handler),
            )
        except InputError:
            raise
        except Exception as error:  # each file system raises its own kinds
            hint = "expected a directory that can be read and written"
            if bucket:
                hint += "; a bucket (gs://...) needs `pip install gcsfs` and credentials"
            raise (Unavailable if _may_pass(error) else CheckpointError)(
                f"Checkpoints cannot be kept in {directory}: {_reason(error)} ({hint})."
            ) from error

    def _look_at_metrics(self) -> None:
        """Sets checkpoints aside whose metric is damaged: Orbax would not open the others either.

        Raises:
          CheckpointError: there is one, and nothing may be written or no other is left.
        """
        if jax.process_index() != 0 or not self._directory.exists():
            return
        saved = [place for place in self._directory.iterdir() if place.name.isdigit()]
        damaged = [place for place in saved if not _has_sound_metrics(place / "metrics")]
        if damaged and (self._read_only or damaged == saved):
            way = "or go on with training, which sets it aside"
            if damaged == saved:
                way = "all of them to start anew, as no sound checkpoint is left"
            raise CheckpointError(
                f"The file {damaged[0] / 'metrics' / 'metrics'} is damaged. Move {damaged[0]} "
                f"elsewhere, {way}."
            )
        for place in damaged:
            self._rename_damaged(int(place.name))

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, *, step: int, meta: dict[str, Any], selection: float | None) -> None:
        """Starts saving in the background; one of the same step is replaced, once this is whole.

        The save before this one is finished first; call `wait` to know how it went.

        Args:
          state: tree of arrays.
          step: updates done.
          meta: anything JSON can hold.
          selection: the metric that picks the best checkpoint; None inside an epoch.

        Raises:
          SaveError: this one cannot be saved; those saved before are as they were.
        """
        self.wait()
        meta = {**meta, "format": FORMAT_VERSION, "checksums": checksums(state)}
        self._pending = step
        with _quiet(), self._failing():
            if step in self._manager.all_steps():
                old = self._directory / str(step)
                self._alone(lambda: old.rename(self._directory / f"{_REPLACED}{step}"))
            self._save(step, state, meta, selection)

    def _save(self, step: int, state: Any, meta: dict[str, Any], selection: float | None) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if selection is None else {"selection": selection},
            force=True,
        )

    def restore(
        self,
        abstract_state: Any,
        step: int,
        *,
        accept: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns (state, meta) of one step.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, or `LEFT_OUT` in place of
            arrays that are not read: they stay that, and nothing is said of them.
          step: one of `steps()`.
          accept: is given `meta` before the state is read, and raises `InputError` if it is not to
            be: of a run of other data, say, whose state has other shapes.

        Raises:
          CheckpointError: if it is damaged or of another model or format.
          Unavailable: if the storage does not answer.
          InputError: of `accept`.
        """
        unusable = f"Checkpoint {self._directory / str(step)} cannot be used"

        def read_meta() -> dict[str, Any]:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self._manager.restore(step, args=args).meta
            if meta.get("format") != FORMAT_VERSION:
                raise CheckpointError(
                    f"format {meta.get('format')!r}, this program reads {FORMAT_VERSION}"
                )
            return meta

        def read_state() -> Any:
            how = ocp.args.PyTreeRestore(
                abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            )
            return self._manager.restore(step, args=ocp.args.Composite(state=how)).state

        meta = _agreed(read_meta, unusable)
        cluster.agree(lambda: accept(meta))
        state = _agreed(read_state, unusable)
        leaves = jax.tree.leaves(state)
        found = checksums([leaf for leaf in leaves if leaf is not LEFT_OUT])
        pairs = itertools.zip_longest(meta["checksums"], leaves)
        saved = [stated for stated, leaf in pairs if leaf is not LEFT_OUT]
        if found != saved:
            wrong = sum(a != b for a, b in zip(found, saved, strict=False))
            raise CheckpointError(f"{unusable}: {wrong} arrays are not what was saved (checksum)")
        return state, meta

    def restore_latest(
        self,
        abstract_state: Any,
        *,
        accept: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> tuple[Any, dict[str, Any], int] | None:
        """Returns (state, meta, step) of the newest sound checkpoint, or None if there is none.

        A damaged one is named in the log, and the one before it is tried; where this may write, the
        damaged one is set aside as `damaged-STEP`. `accept` is that of `restore`.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
          Unavailable: if the storage does not answer; nothing is set aside then.
          InputError: of `accept`.
        """
        steps = self.steps()
        errors = []
        for step in reversed(steps):
            try:
                state, meta = self.restore(abstract_state, step, accept=accept)
            except CheckpointError as error:
                errors.append((step, str(error)))
                logging.warning("%s. Trying the one before it.", error)
                continue
            if not self._read_only:
                for bad, _ in errors:
                    self._set_aside(bad)
            return state, meta, step
        if errors:
            raise CheckpointError(
                "\n".join(message for _, message in errors)
                + f"\nNo sound checkpoint is left in {self._directory}. If the model was changed, "
                "change it back; else use another --workdir to start anew."
            )
        return None

    def restore_last(
        self,
        abstract_state: Any,
        *,
        accept: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> tuple[Any, dict[str, Any], int]:
        """As `restore_latest`, of a run that is over.

        Raises:
          CheckpointError: if there are no checkpoints, too.
        """
        restored = self.restore_latest(abstract_state, accept=accept)
        if restored is None:
            raise CheckpointError(f"{self._directory} holds no checkpoint: train first.")
        return restored

    def restore_best(
        self,
        abstract_state: Any,
        *,
        at_hand: Mapping[int, Any],
        report: Callable[[str], None],
    ) -> tuple[Any, int]:
        """Returns (state, step) of the sound checkpoint with the highest `selection` metric.

        Where none has a metric and can be read, it is the newest of `at_hand`.

        Args:
          abstract_state: as of `restore`.
          at_hand: {step: state} of what is restored already, one at least.
          report: takes a line on a damaged one; the next best is taken then.
        """
        for step in self.best_steps():
            if step in at_hand:
                return at_hand[step], step
            try:
                return self.restore(abstract_state, step)[0], step
            except CheckpointError as error:
                report(f"{error}. The next best is taken for the best.")
        step = max(at_hand)
        return at_hand[step], step

    def best_steps(self) -> list[int]:
        """Returns the steps that have a `selection` metric, the highest first, the later of two."""
        scored = []
        for step in self._manager.all_steps():
            metrics = self._manager.metrics(step)
            if metrics:
                scored.append((_selection(metrics), step))
        return [step for _, step in sorted(scored, reverse=True)]

    def wait(self) -> None:
        """Blocks until a save in the background is whole on disk.

        Raises:
          SaveError: it cannot be saved; those before it are as they were, and on a disk
            what was written of it is removed as far as it can be.
        """
        with self._failing():
            self._manager.wait_until_finished()
        self._pending = None
        self._try_to_tidy()

    def close(self) -> None:
        """Waits for a save in the background and releases everything.

        Whether it is whole on disk `wait` says; an error here would hide what ends the run.
        """
        try:
            self._manager.close()
        except Exception as error:  # each file system raises its own kinds
            logging.info("Closing %s: %s", self._directory, _reason(error))
        self._try_to_tidy()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns the many errors of a save into one, and takes away what it left behind.

        With several processes it takes nothing away, as others may be writing still, and the errors
        of Orbax's barriers, where one waits for a process that is gone, stay what they are.
        """
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            step, self._pending = self._pending, None
            if step is None:
                raise
            if jax.process_count() == 1:
                self._try_to_tidy()
                with contextlib.suppress(OSError):  # that the save failed is what is to be told
                    self._manager.reload()
            elif isinstance(error, (TimeoutError, jax.errors.JaxRuntimeError)):
                raise
            raise SaveError(
                f"The checkpoint of step {step} could not be saved in {self._directory}",
                _reason(error),
            ) from error

    def _try_to_tidy(self) -> None:
        """Tidies as far as it can be done.

        That is after every save: a thread of one that failed may write on, after tidying too.
        """
        with contextlib.suppress(Exception):  # each file system raises its own kinds
            self._tidy()

    def _tidy(self) -> None:
        """Leaves nothing but checkpoints, while none is being saved.

        Removes what was replaced, puts back what a save was to replace that came to nothing, and
        removes what failed saves have half-written, which takes the room that others need.
        """
        if self._read_only or jax.process_index() != 0 or not self._directory.exists():
            return
        for place in list(self._directory.glob(f"{_REPLACED}*")):
            new = self._directory / place.name.removeprefix(_REPLACED)
            if new.exists() and ocp.utils.is_checkpoint_finalized(new):
                place.rmtree()
                continue
            if new.exists():
                new.rmtree()
            place.rename(new)
        for left in list(self._directory.glob("*.orbax-checkpoint-tmp*")):
            left.rmtree(missing_ok=True)

    def _set_aside(self, step: int) -> None:
        self._alone(lambda: self._rename_damaged(step))

    def _alone(self, change: Callable[[], Any]) -> None:
        """Lets the first process change the directory, and all of them look at it again."""

        def first() -> None:
            if jax.process_index() == 0:
                try:
                    change()
                except OSError as error:
                    raise CheckpointError(
                        f"{self._directory} cannot be changed: {_reason(error)}."
                    ) from error

        cluster.agree(first)
        self._manager.reload()

    def _rename_damaged(self, step: int) -> None:
        target = self._directory / f"damaged-{step}"
        suffix = 0
        while target.exists():
            suffix += 1
            target = self._directory / f"damaged-{step}-{suffix}"
        (self._directory / str(step)).rename(target)
        logging.warning("Set the damaged checkpoint aside as %s", target)


def _has_sound_metrics(place: epath.Path) -> bool:
    """Whether the metrics of a checkpoint are whole, or it has none.

    Raises:
      OSError: nobody can say, as they may not be read, or not now.
    """
    if not place.exists():
        return True
    try:
        return math.isfinite(_selection(json.loads((place / "metrics").read_text())))
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError):
        return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the last first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _said(error: BaseException, codes: Iterable[int]) -> str | None:
    """Which of the system's words TensorStore quotes, if any of these codes'."""
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), None)


def _may_pass(error: BaseException) -> bool:
    """Whether the storage did not answer, in whatever kinds of errors that is wrapped."""
    return any(may_pass(found) or _said(found, PASSING) for found in _chain(error))


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: the system's own words where it said something."""
    for found in _chain(error):
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        said = _said(found, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, *PASSING))
        if said:
            return said
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from warning that a checkpoint inside an epoch has no metric."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _selection(metrics: dict[str, float]) -> float:
    return metrics["selection"]
