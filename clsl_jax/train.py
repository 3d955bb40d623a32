"""The training loop, from top to bottom: epochs of steps, recovery, evaluation, checkpoints."""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from clsl_jax import (
    cluster,
    epoch_end,
    errors,
    evaluate,
    experiment,
    features,
    metrics,
    results,
    sharding,
)
from clsl_jax import config as config_lib
from clsl_jax.checkpoint import Checkpointer, SaveError
from clsl_jax.compiled import CompiledSteps, compile_steps
from clsl_jax.data import partial, pipeline, sources
from clsl_jax.data.watched import Watched
from clsl_jax.errors import InputError, listed, unwritable
from clsl_jax.experiment import Experiment
from clsl_jax.preemption import Preempted, PreemptionGuard
from clsl_jax.recovery import recovery_summary
from clsl_jax.score import finite, percent, score_convention
from clsl_jax.train_state import TrainState, evaluation_weights, weights_alone
from clsl_jax.workdir import EMBEDDINGS_NAME, Workdir
from clsl_jax.writer import RunLog


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any] | None:
    """Trains, or goes on training, the run in `workdir` and evaluates it.

    Args:
      config: every key set; see `config.py`.
      workdir: directory of the run. If it holds one already, that run is continued.

    Returns:
      What `results.json` holds; None if a signal stopped the run (everything is saved then).

    Raises:
      InputError: if configuration, workdir, data or checkpoints cannot be used.
    """
    config_lib.validate(config)
    sharding.divide_cpu(config.cpu_devices)
    with Workdir(workdir) as where, PreemptionGuard() as guard:
        cluster.agree(lambda: where.check(config))
        where.hold_checkpoints(where.checkpoints(config))
        log = RunLog(workdir)
        log.console.print(f"clsl_jax: {config.data.name}, workdir {workdir}{_processes()}")
        built = _build(config, where, log, training=True)
        run = _Run(config, built, where, log, guard)
        try:
            with unwritable(workdir, "it goes on from the last checkpoint"):
                return run.train()
        except Preempted as stopped:
            log.console.print(f"{stopped} Run the same command to go on.")
            return None
        finally:
            run.close()


def evaluate_only(config: ml_collections.ConfigDict | None, workdir: str) -> dict[str, Any] | None:
    """Evaluates the last and the best checkpoint of `workdir` again; writes `evaluation.json`.

    Args:
      config: must agree with the one of the run where numbers depend on it; None takes that one.
      workdir: of a run of `train_and_evaluate`.

    Returns:
      What `evaluation.json` holds; None if SIGTERM or Ctrl-C stopped it before that was written.

    Raises:
      InputError: if there is no such run or no sound checkpoint, or if the workdir cannot be held:
        another process is at work there, or its file system has no locks.
    """
    # Before anything asks JAX for its processes, which starts it; what is wrong is told below. A
    # process with a workdir of its own knows of no run, if it is not given the configuration.
    if config is not None:
        config_lib.validate(config)
    with contextlib.suppress(InputError):
        known = Workdir.stored_config(workdir) if config is None else config
        sharding.divide_cpu(known.cpu_devices)
    # Where each process has a workdir of its own, that of process 0 alone has it.
    stored = config_lib.from_json(
        cluster.from_first(lambda: config_lib.to_json(Workdir.stored_config(workdir))), workdir
    )
    if config is not None:
        config_lib.check_resume(stored, config, workdir)
    config = stored if config is None else config
    with Workdir(workdir) as where, PreemptionGuard() as guard:
        log = RunLog(workdir)
        built = _build(config, where, log, training=False)
        run = _Run(config, built, where, log, guard, read_only=True)
        try:
            with unwritable(workdir, "it evaluates anew"):
                return run.evaluate()
        except Preempted as stopped:
            log.console.print(f"{stopped} Run the same command again.")
            return None
        finally:
            run.close()


def _build(
    config: ml_collections.ConfigDict, where: Workdir, log: RunLog, *, training: bool
) -> Experiment:
    return experiment.build_together(
        config,
        embeddings_file=where.path(EMBEDDINGS_NAME),
        report=log.console.print,
        training=training,
    )


def _processes() -> str:
    count = jax.process_count()
    return f", {count} processes with {jax.device_count()} devices" if count > 1 else ""


class _Run:
    """One run in progress: what the loop below would otherwise pass from hand to hand."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        built: Experiment,
        workdir: Workdir,
        log: RunLog,
        guard: PreemptionGuard,
        read_only: bool = False,
    ) -> None:
        self.config, self.experiment, self.workdir = config, built, workdir
        self.log, self.guard = log, guard
        self.data_facts = {
            "annotations_sha256": partial.matrix_sha256(built.annotations),
            "fingerprint": built.dataset.fingerprint,
        }
        self.checkpoints = workdir.checkpoints(config)
        self.checkpointer = Checkpointer(
            self.checkpoints,
            keep=config.checkpoint.keep,
            read_only=read_only,
        )
        try:
            self.steps: CompiledSteps = compile_steps(
                built, config, report=log.console.print, training=not read_only
            )
        except BaseException:
            self.checkpointer.close()
            raise
        # The full labels, for the diagnostic of recovery alone: only `steps.count` sees them.
        self.hidden = None
        if built.options.teaches:
            self.hidden = sharding.put_matrix(
                built.mesh, sharding.pad_rows(built.dataset.train.labels, partial.UNKNOWN)
            )
        self.scored_splits = experiment.scored_splits(config, built.dataset)
        self.unreadable: set[int] = set()  # rows of training images that could not be read
        self.faulty_steps = 0  # left out, and said so
        self.save_error: SaveError | None = None  # of the newest checkpoint
        self.data: Watched | None = None

    def close(self) -> None:
        if self.data is not None:
            self.data.close()
        self.checkpointer.close()
        self.log.close()

    # Training ---------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        built = self.experiment
        restored = self.checkpointer.restore_latest(built.abstract_state, accept=self._check_origin)
        if restored is None:
            state, step, epoch_done = built.new_state(self.log.console.print), 0, True
        else:
            state, meta, step = restored
            epoch_done = meta["epoch_done"]
            self.unreadable = set(meta["unreadable"])
            self.faulty_steps = int(jax.device_get(state.faulty_steps))
            self.log.console.print(f"Going on from step {step} of {built.total_steps}.")
        self._adopt()
        if built.options.recovery_mode == "epoch":
            self._foretell_recovery()
        self.inputs = self._inputs(state, "train", *self.scored_splits)
        self.saved = None if restored is None else (step, epoch_done)
        # Before the threads of the data start: it imports, with torch hidden from all threads.
        self.log.start(step if epoch_done else step - 1)
        data = self.data = self._train_batches(step)
        cluster.meet("is ready")
        while step < built.total_steps or not epoch_done:
            start = time.perf_counter()
            begun = step
            if epoch_done or step % built.steps_per_epoch:
                state, step = self._train_epoch(state, step, data)
            state = self._finish_epoch(state, step, step - begun, start)
            epoch_done = True
        self._all_saved()
        return self._report(state, step, "results.json")

    def _adopt(self) -> None:
        """Makes the workdir one of this configuration, now that a step can be taken."""
        config, built = self.config, self.experiment
        self.workdir.adopt(config)
        self.workdir.save_embeddings(built.label_embeddings, built.dataset.class_names)
        self.meta = {
            "mask_sha256": self.workdir.save_mask(built.mask, config),
            "config": config_lib.to_json(config),
            **self.data_facts,
        }

    def _foretell_recovery(self) -> None:
        """Says what recovery will not do, which the end of the run would tell too late."""
        built, options = self.experiment, self.experiment.options
        if built.total_steps <= options.warmup_steps:
            self.log.console.print(
                "No recovered label will be learned from: recovery.warmup_epochs="
                f"{self.config.recovery.warmup_epochs} and epochs={self.config.epochs}."
            )
        if options.thresholds == "fixed":
            return
        unknown, negatives, positives = (
            (built.annotations == kind).sum(axis=0) for kind in (-1, 0, 1)
        )
        few = (unknown > 0) & (np.minimum(negatives, positives) < options.min_known)
        named = [
            f"{built.dataset.class_names[c]} {positives[c]:,} / {negatives[c]:,}"
            for c in np.flatnonzero(few)
        ]
        if named:
            deed = "handed out" if options.thresholds == "none" else "recovered"
            self.log.console.print(
                f"No label is {deed} for {len(named)} of {len(few)} classes, as fewer positives or "
                f"negatives are known than recovery.min_known={options.min_known}: "
                f"{listed(named, 5)}."
            )

    def _inputs(self, state: TrainState, *splits: str) -> sources.Dataset:
        """Returns what the steps read of these splits: images, or features of a frozen backbone."""
        built = self.experiment
        if not built.caches_features:
            return built.dataset

        return features.cached_features(
            built.dataset,
            built.model,
            state.frozen,
            mesh=built.mesh,
            image_size=self.config.data.image_size,
            batch_size=built.eval_batch_size,
            directory=sources.cache_directory() / "features",
            splits=splits,
            report=self.log.console.print,
            poll=functools.partial(self._end_if_stopped, "features were computed"),
        )

    def _train_batches(self, start: int) -> Watched:
        config, built = self.config, self.experiment

        def batches_from(position: int) -> Iterator[Mapping[str, np.ndarray]]:
            return pipeline.train_iterator(
                self.inputs.train.images,
                batch_size=built.batch_size // jax.process_count(),
                seed=config.seed,
                augment=experiment.augmentation_on("host", config),
                clean_view=experiment.needs_clean_view(built.options, config),
                workers=config.data.workers,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                start=position,
            )

        return Watched(
            batches_from, start=start, timeout=config.data.timeout, report=self.log.console.print
        )

    def _train_epoch(
        self, state: TrainState, step: int, data: Iterator[Mapping[str, np.ndarray]]
    ) -> tuple[TrainState, int]:
        built = self.experiment
        epoch = step // built.steps_per_epoch
        end = (epoch + 1) * built.steps_per_epoch
        every = self.config.checkpoint.every_steps
        title = f"epoch {epoch + 1}/{self.config.epochs}"
        queue = StepQueue(sharding.TRAIN_AHEAD)
        with self.log.progress(title, end - step, built.batch_size) as bar:
            while step < end:
                if self.guard.reached():
                    self._save(state, step, epoch_done=step % built.steps_per_epoch == 0)
                    self._stop(step)
                batch = sharding.put_rows(built.mesh, self._readable(next(data)))
                with jax.transfer_guard("disallow"):
                    state = self.steps.train(state, batch)
                queue.add(state.step)
                step += 1
                bar.advance()
                if every and step % every == 0 and step < end:
                    self._save(state, step, epoch_done=False)
        return state, step

    def _readable(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch for the device; names the images in whose place others stand."""
        batch = dict(batch)
        asked = batch.pop("asked", batch["row"])
        train = self.experiment.dataset.train
        for row in sorted(set(asked[asked != batch["row"]].tolist()) - self.unreadable):
            self.unreadable.add(row)
            reason = self.inputs.train.images.reason(row)
            self.log.console.print(
                f"Training image {train.ids[row]} cannot be read; the next one stands in. {reason}"
            )
        if jax.process_count() == 1:  # with several, all of them count before anything is saved
            self._check_unreadable()
        return batch

    def _check_unreadable(self) -> None:
        train, here = self.experiment.dataset.train, self.unreadable
        self.unreadable = cluster.union(here, len(train.ids))
        for row in sorted(self.unreadable - here):  # on the console, which the first process has
            self.log.console.print(
                f"Training image {train.ids[row]} cannot be read by another process; the next one "
                "stands in."
            )
        share, most = len(self.unreadable) / len(train.ids), self.config.data.max_unreadable
        if share > most:
            names = ", ".join(train.ids[row] for row in sorted(self.unreadable)[:5])
            raise InputError(
                f"{len(self.unreadable)} of {len(train.ids)} training images cannot be read "
                f"({names}{', …' if len(self.unreadable) > 5 else ''}): more than "
                f"data.max_unreadable={most}. Prepare the data again, or raise that share."
            )

    def _finish_epoch(
        self, state: TrainState, step: int, steps_done: int, start: float
    ) -> TrainState:
        """Recovers labels, evaluates, logs and saves; may be done again after an interruption."""
        config, built = self.config, self.experiment
        sums = {k: float(v) for k, v in jax.device_get(state.sums).items()}
        trained = time.perf_counter()
        epoch = step // built.steps_per_epoch
        self._check_finite(state)
        state = self.steps.recover(state)
        values: dict[str, Any] = {"epoch": epoch}
        for name in ("loss", "loss_known", "loss_recovered", "gradient_norm"):
            values[f"train/{name}"] = finite(sums[name] / max(sums["steps"], 1.0))
        found = self._recovery_values(state)
        values.update(found)

        def poll() -> None:
            if self.guard.reached():
                self._save(state, step, epoch_done=False)
                self._stop(step)

        for name in self.scored_splits:
            if name == "test" and not self._logs_test():
                continue
            values.update(self._split_values(state, name, poll))
        selection = values[f"{config.evaluation.selection}/mAP_{config.evaluation.convention}"]
        now = time.perf_counter()
        rate = steps_done * built.batch_size / max(trained - start, 1e-9)
        timing = {
            "epoch": epoch,
            "seconds/train": trained - start,
            "seconds/evaluate": now - trained,
            "images_per_second": rate,
        }
        # Before the checkpoint: rows of epochs that no checkpoint ends are written again.
        self.log.epoch(step, values, timing, self._line(values, timing))
        if epoch % config.checkpoint.every_epochs == 0 or step == built.total_steps:
            self._save(state, step, epoch_done=True, selection=selection)
        return state

    def _logs_test(self) -> bool:
        evaluation = self.config.evaluation
        return evaluation.test_every_epoch or evaluation.selection == "test"

    def _recovery_values(self, state: TrainState) -> dict[str, Any]:
        """Returns how recovered labels compare with the hidden ones; a diagnostic, never used."""
        built = self.experiment
        if not built.options.teaches:
            return {}
        counts, (positives, negatives) = jax.device_get(
            self.steps.count(
                state.recovered, state.recovered_weight, state.annotations, self.hidden
            )
        )
        summary = recovery_summary(counts)
        names = built.dataset.class_names
        values: dict[str, Any] = {
            "recovery/unknown": int((built.annotations < 0).sum()),
            "recovery/recovered_positives": int(positives.sum(dtype=np.int64)),
            "recovery/recovered_negatives": int(negatives.sum(dtype=np.int64)),
        }
        for key, number in summary["overall"].items():
            values[f"recovery/{key}"] = finite(number)
        for key, numbers in summary["per_class"].items():
            values[f"recovery_per_class/{key}"] = {
                name: finite(number) for name, number in zip(names, numbers, strict=True)
            }
        return values

    def _split_values(
        self, state: TrainState, name: str, poll: Callable[[], None]
    ) -> dict[str, Any]:
        split = getattr(self.inputs, name)
        scores = self._predict(state, split, poll)
        values: dict[str, Any] = {}
        for convention in metrics.CONVENTIONS:
            scored = score_convention(
                scores,
                self.experiment.scored_labels(split),
                split.difficult,
                self.experiment.dataset.class_names,
                convention=convention,
            )
            values[f"{name}/mAP_{convention}"] = scored["mAP"]
        values[f"{name}/CF1"] = scored["threshold_0.5"]["CF1"]
        values[f"{name}/OF1"] = scored["threshold_0.5"]["OF1"]
        return values

    def _predict(
        self, state: TrainState, split: sources.Split, poll: Callable[[], None]
    ) -> np.ndarray:
        weights = evaluation_weights(state, ema=self.experiment.options.evaluate_ema)
        return evaluate.predict(
            split.images,
            weights,
            self.steps.predict,
            mesh=self.experiment.mesh,
            batch_size=self.experiment.eval_batch_size,
            poll=poll,
        )

    def _line(self, values: Mapping[str, Any], timing: Mapping[str, float]) -> str:
        convention = self.config.evaluation.convention
        width = len(str(self.config.epochs))
        parts = [
            f"epoch {values['epoch']:{width}d}/{self.config.epochs}",
            f"loss {values['train/loss']:.4f}",
        ]
        for name in ("validation", "test"):
            if f"{name}/mAP_{convention}" in values:
                parts.append(f"{name} mAP {percent(values[f'{name}/mAP_{convention}'])}")
        if "recovery/unknown" in values:
            parts.append(results.recovery_line(values))
        parts.append(f"{timing['images_per_second']:.0f} images/s")
        return "  ".join(parts)

    # Stopping, saving, checking ---------------------------------------------------------------

    def _all_saved(self) -> None:
        """Makes sure that the last checkpoint is whole on disk; else ends the run."""
        try:
            self.checkpointer.wait()
        except SaveError as error:
            raise self._unsaved(error) from error
        if self.save_error is not None:
            raise self._unsaved(self.save_error)

    def _unsaved(self, error: SaveError) -> InputError:
        """Returns what ends the run where a checkpoint is missing."""
        steps = self.checkpointer.steps()
        last = f"from step {steps[-1]}" if steps else "from its start"
        remedy = errors.remedy(error.reason)
        kind, first = (InputError, f"{remedy} and run") if remedy else (errors.Unavailable, "Run")
        return kind(f"{error} {first} the same command again: it goes on {last}.")

    def _go_on_without(self, error: SaveError) -> None:
        """Says that a checkpoint is missing; one of several processes cannot go on.

        The others may wait for it in a barrier of Orbax's.
        """
        if jax.process_count() > 1:
            raise self._unsaved(error) from error
        self.log.console.print(f"{error} The run goes on.")

    def _end_if_stopped(self, work: str) -> None:
        """Ends the run if a signal asks for it, in work of which nothing has to be saved."""
        if self.guard.reached():
            raise Preempted(f"Stopped while {work}.")

    def _stop(self, step: int) -> None:
        self._all_saved()
        raise Preempted(f"Stopped after step {step}; everything is saved.")

    def _save(
        self,
        state: TrainState,
        step: int,
        *,
        epoch_done: bool,
        selection: float | None = None,
    ) -> None:
        if self.saved == (step, epoch_done):
            return
        self._check_finite(state)
        self._check_unreadable()
        unreadable = sorted(self.unreadable)
        meta = {**self.meta, "epoch_done": epoch_done, "unreadable": unreadable}
        try:
            self.checkpointer.wait()
        except SaveError as error:  # of the one before
            self._go_on_without(error)
        self.saved, self.save_error = (step, epoch_done), None
        try:
            self.checkpointer.save(state, step=step, meta=meta, selection=selection)
        except SaveError as error:
            self._go_on_without(error)
            self.saved, self.save_error = None, error

    def _check_origin(self, stored: Mapping[str, Any]) -> None:
        """Refuses another configuration or other data than those of a checkpoint.

        Args:
          stored: what stands beside the state in the checkpoint.
        """
        before = config_lib.from_json(stored["config"], self.checkpoints)
        before.checkpoint.dir = self.config.checkpoint.dir  # it is where they were found
        config_lib.check_resume(before, self.config, self.checkpoints)
        names = {
            "annotations_sha256": "known labels",
            "fingerprint": "images and labels of all splits",
        }
        for key, found in self.data_facts.items():
            if stored[key] != found:
                raise InputError(
                    f"The {names[key]} are not those this run was started with: SHA-256 "
                    f"{found[:12]}…, in the checkpoint {stored[key][:12]}…. Was the data set, its "
                    "cache or labels.file changed? Restore it, or start anew in another --workdir."
                )

    def _check_finite(self, state: TrainState) -> None:
        """Ends the run, or says what was skipped, where a loss or gradient was not finite.

        Called before anything is saved: every checkpoint is of finite weights.
        """
        first, count = (int(x) for x in jax.device_get((state.fault_step, state.faulty_steps)))
        if count <= self.faulty_steps:
            return
        ids = self.experiment.dataset.train.ids
        rows = np.flatnonzero(evaluate.gather(state.faults)[: len(ids)])
        names = listed([f"{ids[row]} (row {row})" for row in rows], 5)
        where = (
            f"The loss or a gradient was NaN or infinite, first in step {first + 1} of "
            f"{self.experiment.total_steps}, with the training images {names}"
        )
        allowed = self.config.optim.skip_nonfinite
        if count > allowed:
            saved = self.checkpointer.steps()
            raise InputError(
                f"{where}. "
                + (f"{count} steps were, {allowed} are allowed. " if allowed else "")
                + (f"The checkpoint of step {saved[-1]} is sound. " if saved else "")
                + "Look at these images, lower optim.learning_rate or set optim.clip_norm in a new "
                "--workdir; or go on with optim.skip_nonfinite=N, which leaves out up to N steps."
            )
        self.faulty_steps = count
        self.log.console.print(f"{where}. Steps left out so far: {count}, allowed: {allowed}.")

    # Results ----------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        state, meta, step = self.checkpointer.restore_last(
            self.experiment.abstract_state, accept=self._check_origin
        )
        self.inputs = self._inputs(state, *self.scored_splits)
        self.meta = meta
        self.unreadable = set(meta["unreadable"])
        return self._report(state, step, "evaluation.json")

    def _report(self, state: TrainState, step: int, name: str) -> dict[str, Any]:
        """Evaluates the last and the best weights on the test split and writes everything."""
        built = self.experiment
        best_state, best_step = self.checkpointer.restore_best(
            weights_alone(built.abstract_state, ema=built.options.evaluate_ema),
            at_hand={step: state},
            report=self.log.console.print,
        )

        poll = functools.partial(self._end_if_stopped, "results were computed")
        scores = {}
        for split in self.scored_splits:
            scores["last", split] = self._predict(state, getattr(self.inputs, split), poll)
            scores["best", split] = (
                scores["last", split]
                if best_state is state
                else self._predict(best_state, getattr(self.inputs, split), poll)
            )
        if built.options.hands_out_others and step < built.total_steps:
            # What is counted and written is what would be handed out, not what is learned from.
            state = self._with_handed_out_labels(state)
        return results.write(
            name,
            config=self.config,
            built=built,
            workdir=self.workdir,
            log=self.log,
            scores=scores,
            epochs={
                "last": step // built.steps_per_epoch,
                "best": best_step // built.steps_per_epoch,
            },
            recovery=self._recovery_values(state),
            state=state,
            unreadable=[built.dataset.train.ids[row] for row in sorted(self.unreadable)],
            mask_sha256=self.meta["mask_sha256"],
            explain=lambda images: self.steps.explain(
                evaluation_weights(best_state, ema=built.options.evaluate_ema), images
            ),
        )

    def _with_handed_out_labels(self, state: TrainState) -> TrainState:
        """Returns the state of an unfinished run with the labels that it would hand out."""
        built = self.experiment
        labels = jax.jit(
            functools.partial(
                epoch_end.recovered_labels, options=built.options.handing_out, mesh=built.mesh
            ),
            out_shardings=(state.recovered.sharding, state.recovered_weight.sharding),
        )
        recovered, weight = labels(state)
        return state.replace(recovered=recovered, recovered_weight=weight)


class StepQueue:
    """Keeps the host from running far ahead of the device, whose memory its batches would fill.

    A batch lies on the device until its step has run. With no more than `most` steps begun and not
    done, the next batch is there before the device asks for it, and the memory for all is known.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.begun: collections.deque[jax.Array] = collections.deque()

    def add(self, result: jax.Array) -> None:
        """Notes a step by a result, which the next may consume; waits for those before it."""
        self.begun.append(jnp.copy(result.addressable_data(0)))
        while len(self.begun) > self.most:
            self.begun.popleft().block_until_ready()
