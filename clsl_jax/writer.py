"""What a run tells: a log for programs, TensorBoard events, and lines for the person watching."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clsl_jax import atomic, command_line

LOG_NAME = "log.jsonl"
TIMING_NAME = "timing.jsonl"


class RunLog:
    """The logs of one run in its workdir; only the first process writes.

    `log.jsonl` holds what is a function of the configuration alone, so that an interrupted run and
    one that was not leave the same bytes; clock readings go to `timing.jsonl`. Both have one row an
    epoch.
    """

    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        self._active = jax.process_index() == 0
        self._tensorboard: Any = None
        self.console = command_line.console(soft_wrap=True, quiet=not self._active)

    def start(self, step: int) -> None:
        """Drops the rows after `step`, left by an interrupted run, and opens the logs."""
        if not self._active:
            return
        for name in (LOG_NAME, TIMING_NAME):
            path = os.path.join(self._workdir, name)
            rows = read_log(path) if os.path.exists(path) else []
            kept = [json.dumps(row, sort_keys=True) for row in rows if row["step"] <= step]
            atomic.write_text(path, "".join(line + "\n" for line in kept))
        with _hidden("torch"):  # which it imports, for seconds, and needs for torch's tensors alone
            from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(
            os.path.join(self._workdir, "tensorboard"), purge_step=step + 1
        )

    def epoch(
        self, step: int, values: Mapping[str, Any], timing: Mapping[str, float], line: str
    ) -> None:
        """Records one epoch.

        Args:
          step: updates done.
          values: JSON-able; scalars go to TensorBoard too.
          timing: clock readings, seconds or rates.
          line: what the console shows.
        """
        if not self._active:
            return
        self._append(LOG_NAME, {"step": step, **values})
        self._append(TIMING_NAME, {"step": step, **timing})
        for name, value in {**values, **timing}.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        self.console.print(line)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with open(os.path.join(self._workdir, name), "a", encoding="utf-8") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")

    @contextmanager
    def progress(self, description: str, total: int, batch_size: int) -> Iterator["Bar"]:
        """Shows a bar with images/s and time left on a terminal, nothing elsewhere."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not (self._active and self.console.is_terminal),
        ) as shown:
            yield Bar(shown, shown.add_task(description, total=total, rate=""), batch_size)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is text, the others are numbers."""
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._tensorboard is not None:
            self._tensorboard.close()


class Bar:
    """One progress bar; `advance` counts a batch."""

    def __init__(self, shown: Progress, task: Any, batch_size: int) -> None:
        self._shown, self._task, self._batch_size = shown, task, batch_size
        self._start, self._done = time.perf_counter(), 0

    def advance(self) -> None:
        """Counts one batch."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        rate = f"{self._done * self._batch_size / max(seconds, 1e-9):,.0f} images/s"
        self._shown.update(self._task, advance=1, rate=rate)


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Makes importing a module fail, as if it were not installed, unless it has been imported.

    The whole process sees it: for imports beside which no other thread imports anything.
    """
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            sys.modules.pop(module, None)


def read_log(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL log; a last line cut off by a kill is left out."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
