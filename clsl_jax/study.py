"""A grid of runs: methods x known fractions x protocols x seeds x data sets, and its tables.

    python -m clsl_jax.study --config=configs/study/scenes.py --workdir=DIR
    python -m clsl_jax.study --config=configs/study/scenes.py --workdir=DIR --shard=0/4
    python -m clsl_jax.study --config=configs/study/scenes.py --workdir=DIR --mode=report

Each cell is a run of `clsl_jax.main` in a process of its own, in a workdir of its own. Finished
cells are never run again, stopped ones go on where they were, failed ones are listed with their
cause and tried again by the next call. Afterwards, and with --mode=report, the tables and figures
are made of the cells that are finished (`study_report.py`). --shard=i/n is for n jobs side by side:
job i runs its share of the cells of every method.
JAX_COMPILATION_CACHE_DIR=DIR lets jobs on machines of one kind share what they compile, on
accelerators and on some CPUs.
Exit status: 0 done, or stopped by SIGTERM or Ctrl-C; 2 input that cannot be used, or a cell failed.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from clsl_jax import atomic, command_line, methods
from clsl_jax import config as config_lib
from clsl_jax.data import partial
from clsl_jax.errors import InputError, unwritable
from clsl_jax.workdir import Workdir

CELL_NAME, FAILURE_NAME, OUTPUT_NAME = "cell.json", "failure.txt", "output.txt"
COST_NAME, RESULTS_NAME = "cost.json", "results.json"
_MODES = ("run", "report")


def base_study() -> ml_collections.ConfigDict:
    """Returns every key of a study with its default; `configs/study/*.py` start from here."""
    c = ml_collections.ConfigDict()
    c.configs = ("configs/scenes.py",)  # what is trained: a data set and its recipe each
    c.methods = ("known_asl", "clsl")  # names in `clsl_jax/methods.py`
    c.baseline = "known_asl"  # the method that the others are compared with, seed by seed
    c.known_fractions = (0.1, 0.2, 0.3)
    c.protocols = ("uniform",)
    c.seeds = (0, 1, 2, 3, 4)  # of initial weights, order and the known-label mask together
    c.settings = ()  # "key=value" of every run, before the method's own
    # Method and "key=value": an ablation's row is a method with keys of its own, under a new name.
    c.variants = ()  # (name, method, "key=value key=value ...") each
    c.split = "test"  # test | validation: of average precision in tables; validation to tune on
    c.convention = "interpolated"  # of average precision in tables
    c.weights = "best"  # best | last: of which epoch; the best of those that are saved
    # (name, data set, protocol, known fraction, mAP in percent, source) each; tables mark them.
    c.published = ()
    return c


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      config: configuration file, with what stands after its colon.
      method: name of the method or variant.
      protocol, known_fraction: of the known labels, as they are in effect: a method or variant may
        set its own over the grid's. No fraction where the protocol has none.
      seed: of weights, order and mask.
      settings: ("key=value", ...), all that is set over the configuration.
    """

    config: str
    method: str
    protocol: str
    known_fraction: float | None
    seed: int
    settings: tuple[str, ...]

    @property
    def dataset(self) -> str:
        """The configuration's name without directory and ending, such as `scenes-strong`."""
        path, _, argument = self.config.partition(":")
        name = os.path.splitext(os.path.basename(path))[0]
        return f"{name}-{argument}" if argument else name

    @property
    def setting(self) -> tuple[str, str, float | None]:
        """Data set, protocol and known fraction: what numbers have to share to be compared."""
        return self.dataset, self.protocol, self.known_fraction

    @property
    def directory(self) -> str:
        """Of the cell, inside the study's workdir."""
        labels = self.protocol
        if self.known_fraction is not None:
            labels += f"-{self.known_fraction:g}"
        return os.path.join("cells", self.dataset, labels, self.method, f"seed-{self.seed}")

    @property
    def arguments(self) -> list[str]:
        """Of `python -m clsl_jax.main` for this cell, but for the workdir."""
        return [f"--config={self.config}", *(f"--config.{s}" for s in self.settings)]


def cells(study: ml_collections.ConfigDict) -> list[Cell]:
    """Returns the grid in the order in which it is run: all methods of a seed before the next.

    Raises:
      InputError: an unknown method, a variant with the name of another, a baseline that is none
        of the methods or that no other method can be compared with, a known fraction that is none,
        or an empty grid.
    """
    named = {name: (name, "") for name in study.methods}
    for name, method, extra in study.variants:
        if name in named or name in methods.METHODS:
            raise InputError(f"A variant has a name of its own: {name!r} is there already.")
        named[name] = method, extra
    for name in named:
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
            raise InputError(f"A method's name is a directory: {name!r} has other characters.")
    if study.baseline not in named:
        raise InputError(f"baseline={study.baseline!r} is none of {', '.join(named)}.")
    grid = []
    every = (study.configs, study.seeds, study.protocols, study.known_fractions)
    for config, seed, protocol, fraction in itertools.product(*every):
        for name, (method, extra) in named.items():
            settings = {
                **_parsed(study.settings),
                "seed": seed,
                "labels.seed": seed,
                "labels.protocol": protocol,
                "labels.known_fraction": fraction,
                **methods.find(method).settings,
                **_parsed(extra.split()),
            }
            in_effect = str(settings["labels.protocol"])
            known = None
            if in_effect in partial.BY_FRACTION:
                known = _known_fraction(settings["labels.known_fraction"])
                settings["labels.known_fraction"] = f"{known:g}"
            else:
                del settings["labels.known_fraction"]
            text = tuple(f"{key}={value}" for key, value in settings.items())
            grid.append(Cell(config, name, in_effect, known, seed, text))
    if not grid:
        raise InputError("The study's grid is empty: every list needs an entry.")
    known = {cell.protocol for cell in grid if cell.method == study.baseline}
    if not known & set(study.protocols):
        raise InputError(
            f"baseline={study.baseline!r} is trained on labels of protocol {', '.join(known)}, so "
            f"that methods on those of {', '.join(study.protocols)} cannot be compared with it."
        )
    return list(dict.fromkeys(grid))  # cells that differ in what they ignore are one


def _known_fraction(value: Any) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= 1:
            return float(value)
    raise InputError(f"labels.known_fraction={value}: expected a number greater than 0, at most 1.")


def _parsed(settings: Sequence[str]) -> dict[str, str]:
    known = config_lib.flatten(config_lib.base_config())
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"{setting!r}: expected key=value.")
        if key not in known:
            raise InputError(config_lib.unknown_key_message(key, config_lib.base_config()))
        found[key] = value
    return found


def is_finished(cell: Cell, workdir: str) -> bool:
    """Returns whether a cell has its results.

    Raises:
      InputError: they are of another configuration: other settings, or another file of that name.
    """
    directory = os.path.join(workdir, cell.directory)
    if not os.path.exists(os.path.join(directory, RESULTS_NAME)):
        return False
    config = command_line.config_of(cell.arguments)
    config_lib.check_resume(Workdir.stored_config(directory), config, directory)
    return True


class Stopped(Exception):
    """The study was asked to stop; the cell at work has saved its state."""


class Runner:
    """Runs cells one after another, each in a process that a signal to this one reaches."""

    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def __enter__(self) -> "Runner":
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background
            numbers.append(signal.SIGINT)
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, *unused: object) -> None:
        self._stopping = True
        if self._child is not None:
            # Not `terminate`: it would take the status of a child that has ended from `run`.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)

    def run(self, cell: Cell) -> str:
        """Runs or continues a cell; returns why it failed, or nothing.

        Raises:
          Stopped: on SIGTERM or Ctrl-C.
        """
        directory = os.path.join(self._workdir, cell.directory)
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, CELL_NAME)
        described = json.dumps(dataclasses.asdict(cell), indent=2, sort_keys=True)
        atomic.write_text(path, described + "\n")
        failure = os.path.join(directory, FAILURE_NAME)
        if os.path.exists(failure):
            os.remove(failure)
        command = [sys.executable, "-m", "clsl_jax.main", *cell.arguments, f"--workdir={directory}"]
        if self._stopping:
            raise Stopped
        start = time.perf_counter()
        with open(os.path.join(directory, OUTPUT_NAME), "ab") as output:
            before = output.tell()
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            if self._stopping:  # while it was started
                self._stop()
            _, status, usage = os.wait4(self._child.pid, 0)
            self._child.returncode = os.waitstatus_to_exitcode(status)
        code, self._child = self._child.returncode, None
        _add_cost(directory, time.perf_counter() - start, usage.ru_maxrss)
        # It is written last: what befell the process behind it costs nothing.
        if os.path.exists(os.path.join(directory, RESULTS_NAME)):
            return ""
        if self._stopping:
            raise Stopped
        cause = _last_words(os.path.join(directory, OUTPUT_NAME), before) or "it said nothing"
        cause = f"exit status {code}: {cause}" if code >= 0 else f"signal {-code}: {cause}"
        atomic.write_text(failure, cause + "\n")
        return cause


def _add_cost(directory: str, seconds: float, kilobytes: int) -> None:
    """Notes what the cell's processes took so far, those that were stopped or failed included."""
    path, mebibytes = os.path.join(directory, COST_NAME), kilobytes / 1024
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        seconds += before["seconds"]
        mebibytes = max(mebibytes, before["peak_memory_mib"])
    cost = {"seconds": seconds, "peak_memory_mib": mebibytes}
    atomic.write_text(path, json.dumps(cost) + "\n")


def _last_words(path: str, start: int) -> str:
    """Returns the last error that a process printed, in one line; its output starts at a byte."""
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines()[-60:] if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error" in line]
    return (errors or lines or [""])[-1][:500]


def run_cells(
    grid: Sequence[Cell], workdir: str, console: Console, shard: tuple[int, int] = (0, 1)
) -> dict[Cell, str]:
    """Runs every cell of a shard that is not finished; returns {failed cell: cause}.

    Args:
      grid: all cells.
      workdir: of the study.
      console: takes a line for each cell.
      shard: (i, n): of the grid, those of `shard_of`.

    Raises:
      InputError: a cell was run before with other settings.
      Stopped: on SIGTERM or Ctrl-C.
    """
    mine = shard_of(grid, *shard)
    todo = [cell for cell in mine if not is_finished(cell, workdir)]
    console.print(f"{len(mine)} cells, {len(mine) - len(todo)} of them finished before.")
    failed = {}
    with Runner(workdir) as runner:
        for number, cell in enumerate(todo, 1):
            start = time.perf_counter()
            cause = runner.run(cell)
            seconds = time.perf_counter() - start
            console.print(
                f"{number}/{len(todo)} {cell.directory}: "
                + (f"failed: {cause}" if cause else f"done in {seconds:.0f} s")
            )
            if cause:
                failed[cell] = cause
    return failed


def shard_of(grid: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """Returns the cells of one of `count` jobs, in the order of the grid.

    The cells are dealt out method by method: no job, and so no machine, has a method for itself.
    """
    place = {name: k for k, name in enumerate(dict.fromkeys(cell.method for cell in grid))}
    mine = set(sorted(grid, key=lambda cell: place[cell.method])[index::count])
    return [cell for cell in grid if cell in mine]


def parse_shard(text: str) -> tuple[int, int]:
    """Returns (i, n) of "i/n".

    Raises:
      InputError: if it is not 0 <= i < n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(part) for part in found.groups()) if found else (0, 0)
    if index >= count:
        raise InputError(f"--shard={text}: expected i/n with 0 <= i < n, such as 0/4.")
    return index, count


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Configuration of the study.")
    flags.DEFINE_string("workdir", None, "Directory of the study; made if it does not exist.")
    flags.DEFINE_string("shard", "0/1", "i/n: run the i-th, from 0 on, of n shares of the grid.")
    flags.DEFINE_enum("mode", "run", _MODES, "What to do.")


def _is_text(entry: Any) -> bool:
    return isinstance(entry, str)


def _is_variant(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 3 and all(map(_is_text, entry))


def _is_published(entry: Any) -> bool:
    if not isinstance(entry, (tuple, list)) or len(entry) != 6:
        return False
    *texts, fraction, percent, source = entry
    numbers = isinstance(fraction, (int, float)) and isinstance(percent, (int, float))
    return numbers and all(map(_is_text, (*texts, source)))


# Key of a study: what its entries are.
_ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("configs", "methods", "protocols", "settings"), (_is_text, "text")),
    "known_fractions": (
        lambda entry: isinstance(entry, (int, float)) and 0 < entry <= 1,
        "number greater than 0, at most 1",
    ),
    "seeds": (lambda entry: isinstance(entry, int) and 0 <= entry < 2**32, "number from 0 on"),
    "variants": (_is_variant, '(name, method, "key=value ...")'),
    "published": (
        _is_published,
        "(name, data set, protocol, known fraction, mAP in percent, source)",
    ),
}


def check(study: Mapping[str, Any]) -> None:
    """Refuses keys that a study does not have, and values of another kind.

    Raises:
      InputError: naming them, or keys that are missing.
    """
    base = base_study()
    strange = [key for key in study if key not in base]
    if strange:
        raise InputError(f"There is no study key {strange[0]!r}; there are {', '.join(base)}.")
    missing = [key for key in base if key not in study]
    if missing:
        raise InputError(f"The study has no {', '.join(missing)}: start from study.base_study().")
    wrong = [
        f"{key}={study[key]!r}: expected {'several in brackets' if is_list else 'text'}"
        for key, is_list in ((k, isinstance(base[k], tuple)) for k in study)
        if isinstance(study[key], (tuple, list)) != is_list
    ]
    for key, (fits, expected) in _ENTRIES.items():
        if isinstance(study[key], (tuple, list)):
            strange = [entry for entry in study[key] if not fits(entry)]
            wrong += [f"{key}: {entry!r} is no {expected}" for entry in strange]
    if study["split"] not in ("test", "validation"):
        wrong.append(f"split={study['split']!r}: test or validation")
    if study["split"] == "validation" and study["published"]:
        wrong.append("split='validation': published numbers are of the test split; leave them out")
    if study["convention"] not in ("interpolated", "uninterpolated"):
        wrong.append(f"convention={study['convention']!r}: interpolated or uninterpolated")
    if study["weights"] not in ("best", "last"):
        wrong.append(f"weights={study['weights']!r}: best or last")
    if wrong:
        raise InputError("The study cannot be run:\n  " + "\n  ".join(wrong))


def work(arguments: Sequence[str]) -> None:
    """Does what the flags say."""
    from clsl_jax import study_report

    command_line.refuse_arguments(arguments)
    values = flags.FLAGS
    study = command_line.given_config(values)
    if not values.workdir or study is None:
        raise InputError("--config=configs/study/NAME.py and --workdir=DIR are needed.")
    check(study)
    grid = cells(study)
    shard = parse_shard(values.shard)
    console = command_line.console(soft_wrap=True)
    failed: dict[Cell, str] = {}
    with unwritable(values.workdir, "finished cells are not run again"):
        if values.mode == "run":
            os.makedirs(values.workdir, exist_ok=True)
            try:
                failed = run_cells(grid, values.workdir, console, shard)
            except Stopped:
                console.print("Stopped. Run the same command to go on.")
                return
        study_report.write(study, grid, values.workdir, console)
    if failed:
        lines = "\n  ".join(f"{cell.directory}: {cause}" for cell, cause in failed.items())
        raise InputError(f"{len(failed)} cells failed; the next call tries them again:\n  {lines}")


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(
        define_flags,
        work,
        explain=command_line.explain_config(base_study, file="clsl_jax/study.py"),
    )


if __name__ == "__main__":
    cli()
