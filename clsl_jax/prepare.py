"""Turns a data set's official files, or a table of one's own, into what training reads.

python -m clsl_jax.prepare --dataset=NAME --source=DIR --out=DIR, where NAME is
  voc2007, voc2012   a VOCdevkit tree
  coco2014           annotations/instances_*.json and image folders
  nuswide            ImageList, Groundtruth, Concepts81.txt and images
  vg500              SSGRL's partition files and Visual Genome's images
  table              a CSV, TSV or Parquet with an image path and labels a row

`--check-only` only prints the report: counts against the published ones, broken images, copies.
Nothing is downloaded; images are stored as they are. A run that was stopped goes on where it was.
`--config.data.name=NAME --config.data.dir=OUT` trains on the result.
Exit status: 0 done; 2 input that cannot be used.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import Progress

from clsl_jax import atomic, command_line
from clsl_jax.data import inspection, stored, verification
from clsl_jax.data.formats import coco, nuswide, table, vg500, voc
from clsl_jax.data.formats.listing import ImageList, Listing, without_labels
from clsl_jax.data.inspection import MISSING, UNREADABLE, Inspected
from clsl_jax.data.sources import PREPARED_NAMES, load_prepared
from clsl_jax.data.splits import stratified_split
from clsl_jax.data.verification_text import report_text
from clsl_jax.errors import InputError, listed, printable, writing

LEAVE_OUT = (MISSING, UNREADABLE)
_CONFIG, _VERSION = "prepared", "1.0.0"
# The configuration of each set; some have to be told that the set is another than its own.
_CONFIGS = {
    "voc2007": ("voc", False),
    "voc2012": ("voc", True),
    "coco2014": ("coco", False),
    "nuswide": ("nuswide", False),
    "vg500": ("coco", True),
    "table": ("table", False),
}
# As configs/table.py has them; a larger part for validation if that is too few to pick an epoch.
_BATCH_SIZE, _VALIDATION_FRACTIONS = 32, (0.15, 0.3, 0.5)
# Options that only some data sets have.
_BELONGS_TO = {
    "voc_test": ("voc2012",),
    "class_names": ("vg500", "table"),
    "images": ("table",),
    "image_column": ("table",),
    "split_column": ("table",),
    "labels_column": ("table",),
    "label_separator": ("table",),
    "unlisted": ("table",),
    "empty": ("table",),
    "ignore_columns": ("table",),
    "cells": ("table",),
    "test_fraction": ("table",),
    "seed": ("table",),
}
# Seconds between lines about progress where there is no terminal to draw a bar in.
_LINE_SECONDS = 30


class _Files(Sequence):
    """The examples of a split, read when asked for."""

    def __init__(
        self, images: ImageList, inspected: Sequence[Inspected], advance: Callable[[], None]
    ):
        self._images, self._inspected, self._advance = images, inspected, advance

    def __len__(self) -> int:
        return len(self._images.ids)

    def __getitem__(self, row: int) -> stored.Example:
        path = self._images.paths[row]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read any more ({error.strerror}).") from None
        if hashlib.sha256(content).hexdigest() != self._inspected[row].sha256:
            raise InputError(f"{path} changed while the set was prepared: start again.")
        self._advance()
        return stored.Example(content, self._images.labels[row], self._images.ids[row])


def prepare(
    listing: Listing,
    *,
    source: str,
    out: pathlib.Path | None,
    check_only: bool = False,
    leave_out: Sequence[str] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
    workers: int = 4,
    say: Callable[[str], None] = print,
) -> pathlib.Path | None:
    """Checks a data set, reports on it and stores it.

    Args:
      listing: the set.
      source: where it was read, for the report.
      out: directory of prepared sets; None with `check_only` leaves no trace.
      check_only: only report.
      leave_out: of `LEAVE_OUT`: images that are left out; otherwise they are an error.
      test_fraction: share of the images held out for testing where the set has no test split,
        stratified by label, copies of an image together.
      seed: of that split.
      workers: threads that read and decode.
      say: takes the report and what was done.

    Returns:
      The prepared directory; None with `check_only`.

    Raises:
      InputError: no known training label, images that are missing or cannot be read, no image left
        in a split, or another set in the same place, which then keeps its report.
    """
    _check_splits(listing, test_fraction)
    home = out / listing.name if out else None
    journal = home / "inspected.jsonl" if home else None
    inspected = _inspect(listing.splits, workers, journal)
    every, notes = _with_test_split(listing, inspected, test_fraction, seed)
    found = {split: [inspected[path] for path in part.paths] for split, part in every.items()}
    rows = {split: verification.usable_rows(facts) for split, facts in found.items()}
    splits = {split: part.rows(rows[split]) for split, part in every.items()}
    notes += _label_notes(listing, splits["train"].labels)
    report = verification.build_report(listing, every, found, source=source, notes=notes)
    text = report_text(report)
    say(text)
    inspected = {split: [facts[row] for row in rows[split]] for split, facts in found.items()}
    content = verification.content_sha256(listing.class_names, splits, inspected)
    final = home / _CONFIG / _VERSION if home and not check_only else None
    holds_other = final is not None and _holds_other(final, content)
    if final and not holds_other:  # otherwise what lies there keeps its own report
        _write(home / "report.txt", text)
        _write(home / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _refuse_broken(every, found, leave_out)
    for split, part in splits.items():
        if not part.ids:
            raise InputError(f"The split {split} has no image that can be read.")
    if final is None:
        return None
    if holds_other:
        raise InputError(f"{final} holds other images or labels: delete it, or name another --out.")
    directory = _store(listing, splits, inspected, out, report, content)
    journal.unlink(missing_ok=True)
    say(
        f"{directory}: {sum(len(part.ids) for part in splits.values()):,} images.\n"
        f"{_next_step(listing.name, directory, out)}"
    )
    return directory


def _label_notes(listing: Listing, labels: np.ndarray) -> list[str]:
    """Returns what the known training labels, int8 [N, C], cannot teach."""
    notes = []
    if not (labels == 0).any():
        notes.append(
            "No training label says that something is absent. If what is empty is not there: "
            "--empty=negative (of lists: --unlisted=negative); else train by "
            "configs/table.py:positives."
        )
    unknown = np.flatnonzero((labels == -1).all(axis=0))
    if len(unknown):
        names = listed([listing.class_names[c] for c in unknown], 10)
        notes.append(f"No training label is known of {names}: what is found of it means nothing.")
    if listing.name == "table" and not (labels == -1).any():
        notes.append("No training label is unknown, so that there is none to recover.")
    return notes


def _next_step(name: str, directory: pathlib.Path, out: pathlib.Path) -> str:
    """Returns the command that trains on a prepared set, or says that none can yet."""
    file, other = _CONFIGS[name]
    config = f"configs/{file}.py"
    given = [f"--config.data.name={name}"] if other else []
    if name == "table":
        fits = (_fit_table(directory, fraction) for fraction in _VALIDATION_FRACTIONS)
        recipe, given = next((found for found in fits if found), ("", None))
        if given is None:
            return (
                "It cannot be trained on yet: two training images are needed, and images for "
                "validation with a class that is known to be in one and not in another. Label more."
            )
        config += recipe
    words = [*given, f"--config.data.dir={shlex.quote(str(out))}", "--workdir=RUN"]
    return f"Train on it: python -m clsl_jax.main --config={config} {' '.join(words)}"


def _fit_table(directory: pathlib.Path, validation_fraction: float) -> tuple[str, list[str]] | None:
    """Returns the recipe of configs/table.py and the keys that a prepared table needs.

    Args:
      directory: of the prepared table.
      validation_fraction: held out for validation if the table has no such split.

    Returns:
      (":positives" or "", flags); None if too little is left to train on, or to pick an epoch by.
    """
    dataset = load_prepared(
        directory,
        name="table",
        image_size=1,
        validation_fraction=validation_fraction,
        cache="none",
    )
    labels, validation = dataset.train.labels, dataset.validation.labels
    recipe = "" if (labels == 0).any() else ":positives"
    if recipe:
        validation = np.maximum(validation, 0)  # as it is scored there
    there, absent = ((validation == kind).any(axis=0) for kind in (1, 0))
    if len(labels) < 2 or not (there & absent).any():
        return None
    given = []
    if validation_fraction != _VALIDATION_FRACTIONS[0]:
        given.append(f"--config.data.validation_fraction={validation_fraction}")
    if len(labels) < _BATCH_SIZE:
        given.append(f"--config.batch_size={2 ** (len(labels).bit_length() - 1)}")
    return recipe, given


def _inspect(
    splits: Mapping[str, ImageList], workers: int, journal: pathlib.Path | None
) -> dict[pathlib.Path, Inspected]:
    paths = [path for part in splits.values() for path in part.paths]
    with _progress("checking images", len(paths)) as advance:
        found = inspection.inspect_images(paths, workers=workers, journal=journal, advance=advance)
    return dict(zip(paths, found, strict=True))


def _check_splits(listing: Listing, test_fraction: float) -> None:
    if "train" not in listing.splits:
        raise InputError(f"{listing.name}: no image is for training (split train).")
    if not np.isin(listing.splits["train"].labels, (0, 1)).any():
        raise InputError(
            f"{listing.name}: no label of a training image is known (1 or 0), so that nothing can "
            "be learned."
        )
    if "test" not in listing.splits and not test_fraction > 0:
        raise InputError(
            f"--test_fraction={test_fraction:g}: expected more than 0, as some images have to be "
            "held out for testing; or name a split column that says which."
        )


def _with_test_split(
    listing: Listing, inspected: Mapping[pathlib.Path, Inspected], fraction: float, seed: int
) -> tuple[dict[str, ImageList], list[str]]:
    """Returns the splits; if none is for testing, with readable images of `train` as one."""
    splits = dict(listing.splits)
    if "test" in splits:
        return splits, []
    train = splits["train"]
    facts = [inspected[path] for path in train.paths]
    usable = np.array(verification.usable_rows(facts), np.int64)
    groups = np.array([facts[row].sha256 for row in usable])
    held = usable[stratified_split(train.labels[usable], fraction, seed, groups)[1]]
    if not len(held):
        raise InputError(
            f"{listing.name}: {len(usable)} images are too few to hold out {fraction:.0%} for "
            "testing; name a split column, or a larger --test_fraction."
        )
    kept = np.setdiff1d(np.arange(len(train.ids)), held)
    splits = {**splits, "train": train.rows(kept), "test": train.rows(held)}
    note = f"No split for testing: {len(held):,} images held out, by label, seed {seed}."
    return splits, [note]


def _refuse_broken(
    splits: Mapping[str, ImageList],
    inspected: Mapping[str, Sequence[Inspected]],
    leave_out: Sequence[str],
) -> None:
    for state in (state for state in LEAVE_OUT if state not in leave_out):
        found = [
            path
            for split, part in splits.items()
            for path, facts in zip(part.paths, inspected[split], strict=True)
            if facts.state == state
        ]
        if found:
            raise InputError(
                f"{len(found):,} {state} image{'s' * (len(found) > 1)} (the first: {found[0]}). "
                "Bring back what is whole, or go on without by "
                f"--leave_out={','.join([*leave_out, state])}."
            )


def _holds_other(directory: pathlib.Path, content: str) -> bool:
    """Whether a prepared set is there already, of other content."""
    if not os.path.isdir(directory):
        return False
    return stored.open_prepared(directory).facts.get("content_sha256") != content


def _store(
    listing: Listing,
    splits: Mapping[str, ImageList],
    inspected: Mapping[str, Sequence[Inspected]],
    out: pathlib.Path,
    report: Mapping,
    content: str,
) -> pathlib.Path:
    def facts(labels: Mapping[str, np.ndarray]) -> dict:
        return {
            "content_sha256": content,
            "images": {split: len(part.ids) for split, part in splits.items()},
            "without_labels": {split: int(without_labels(labels[split]).sum()) for split in labels},
            "left_out": {
                split: {state: len(part[state]) for state in LEAVE_OUT}
                for split, part in report["splits"].items()
            },
            "leaks": len(report["leaks"]),
            "notes": report["notes"],
        }

    with _progress("storing images", sum(len(part.ids) for part in splits.values())) as advance:
        return stored.prepare(
            out,
            name=listing.name,
            config=_CONFIG,
            version=_VERSION,
            class_names=listing.class_names,
            splits={
                split: _Files(part, inspected[split], advance) for split, part in splits.items()
            },
            facts=facts,
            description=listing.description,
            licence=listing.licence,
            resume=content[:16],
        )


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows progress on stderr: a bar in a terminal, elsewhere a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
        return
    state = {"done": 0, "spoken": time.monotonic()}

    def advance() -> None:
        state["done"] += 1
        if time.monotonic() - state["spoken"] > _LINE_SECONDS:
            state["spoken"] = time.monotonic()
            print(f"{what}: {state['done']:,} of {total:,}", file=sys.stderr, flush=True)

    yield advance


def _write(path: pathlib.Path, text: str) -> None:
    with writing(path, "; name another --out"):
        atomic.write_text(path, text)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_enum("dataset", None, PREPARED_NAMES, "What lies in --source.")
    flags.DEFINE_string("source", None, "The set's folder; for table also the file itself.")
    flags.DEFINE_string("out", None, "Directory of prepared sets: data.dir of the configuration.")
    flags.DEFINE_bool("check-only", False, "Print the report and store nothing.")
    flags.DEFINE_alias("check_only", "check-only")
    flags.DEFINE_list(
        "leave_out", [], "missing, unreadable: images to go on without; nuswide: missing at least."
    )
    flags.DEFINE_integer("workers", 0, "Threads that decode; 0: one a core.", lower_bound=0)
    flags.DEFINE_enum(
        "voc_test", "auto", voc.TEST_CHOICES, "voc2012: test on test (its labels needed) or val."
    )
    flags.DEFINE_string("class_names", None, "vg500, label lists: text file, a class a line.")
    flags.DEFINE_string("images", None, "table: folder of the images, if not the table's own.")
    flags.DEFINE_string("image_column", "", "table: column of image paths.")
    flags.DEFINE_string("split_column", "", "table: column of train, validation or test.")
    flags.DEFINE_string("labels_column", "", "table: column of label lists, for class columns.")
    flags.DEFINE_string("label_separator", ";", "table: between the labels of a list.")
    flags.DEFINE_enum(
        "unlisted", "negative", table.UNLISTED, "table: what labels are that a list leaves out."
    )
    flags.DEFINE_enum(
        "empty", "unknown", table.EMPTY, "table: what an empty cell says, or a list of no labels."
    )
    flags.DEFINE_list("ignore_columns", [], "table: columns that are no classes.")
    flags.DEFINE_list(
        "cells",
        [],
        f"table: what cells may say beside 1, 0 and nothing: {', '.join(table.WORDS)} (? and -1: "
        "unknown), or words of yours: x=1,nein=0,NA=?.",
    )
    flags.DEFINE_float(
        "test_fraction", 0.2, "table: share held out for testing if no split is.", 0.0, 0.9
    )
    flags.DEFINE_integer("seed", 0, "table: of that split.", 0, upper_bound=2**32 - 1)


def read_listing(values: flags.FlagValues) -> Listing:
    """Returns what the files of `--source` say, as the flags tell to read them.

    Raises:
      InputError: files are missing, or say something that cannot be.
    """
    source = pathlib.Path(values.source)
    if not os.access(source, os.R_OK):
        own = values.dataset == "table"
        what = "the table, or the folder that it is in" if own else "the folder of the set"
        raise InputError(f"--source={source} does not exist or may not be read; expected {what}.")
    class_names = pathlib.Path(values.class_names) if values.class_names else None
    if values.dataset in ("voc2007", "voc2012"):
        return voc.read_voc(source, year=values.dataset[3:], test=values.voc_test)
    if values.dataset == "coco2014":
        return coco.read_coco(source)
    if values.dataset == "nuswide":
        return nuswide.read_nuswide(source)
    if values.dataset == "vg500":
        return vg500.read_vg500(source, class_names=class_names)
    return table.read_own_table(
        source,
        columns=table.Columns(
            image=values.image_column,
            split=values.split_column,
            labels=values.labels_column,
            separator=values.label_separator,
            ignored=tuple(values.ignore_columns),
        ),
        words=values.cells,
        unlisted=values.unlisted,
        empty=values.empty,
        class_names=class_names,
        images=pathlib.Path(values.images) if values.images else None,
        may_miss=MISSING in values.leave_out,
        may_break=UNREADABLE in values.leave_out,
    )


def _work(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    command_line.refuse_arguments(arguments)
    check_only = values["check-only"].value
    command_line.require(values, "dataset", "NAME", f"one of {', '.join(PREPARED_NAMES)}")
    command_line.require(values, "source", "PATH", "the folder that holds its files")
    if not check_only:
        command_line.require(values, "out", "DIR", "the directory to prepare it in")
    if values.out and printable(values.out) != values.out:
        raise InputError(f"--out={values.out!r} is not UTF-8: name another directory.")
    command_line.refuse_foreign(values, "dataset", _BELONGS_TO)
    if unknown := set(values.leave_out) - set(LEAVE_OUT):
        raise InputError(
            f"--leave_out={sorted(unknown)[0]!r} is unknown; choose of {', '.join(LEAVE_OUT)}."
        )
    leave_out = set(values.leave_out) | ({MISSING} if values.dataset == "nuswide" else set())
    prepare(
        read_listing(values),
        source=values.source,
        out=pathlib.Path(values.out) if values.out else None,
        check_only=check_only,
        leave_out=sorted(leave_out),
        test_fraction=values.test_fraction,
        seed=values.seed,
        workers=values.workers or os.cpu_count() or 1,
    )


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, _work)


if __name__ == "__main__":
    cli()
