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
from clsl_jax.data.sources import PREPARED_NAMES
from clsl_jax.data.splits import stratified_split
from clsl_jax.data.verification_text import report_text
from clsl_jax.errors import InputError, writing

LEAVE_OUT = (MISSING, UNREADABLE)
_CONFIG, _VERSION = "prepared", "1.0.0"
# The configuration that each set has of its own; the others name theirs to that of COCO.
_CONFIGS = {"voc2007": "voc", "coco2014": "coco", "nuswide": "nuswide", "table": "table"}
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
      InputError: images that are missing or cannot be read, no image left in a split, or another
        set in the same place.
    """
    home = out / listing.name if out else None
    journal = home / "inspected.jsonl" if home else None
    inspected = _inspect(listing.splits, workers, journal)
    splits, notes = _with_test_split(listing, inspected, test_fraction, seed)
    if not (splits["train"].labels == 0).any():
        notes.append(
            "No training label says that something is absent. If what is empty is not there: "
            "--empty=negative (of lists: --unlisted=negative); else train by "
            "configs/table.py:positives."
        )
    inspected = {split: [inspected[path] for path in part.paths] for split, part in splits.items()}
    report = verification.build_report(listing, splits, inspected, source=source, notes=notes)
    text = report_text(report)
    say(text)
    if home and not check_only:
        _write(home / "report.txt", text)
        _write(home / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _refuse_broken(splits, inspected, leave_out)
    for split, part in splits.items():
        rows = verification.usable_rows(inspected[split])
        if not rows:
            raise InputError(f"The split {split} has no image that can be read.")
        splits[split], inspected[split] = part.rows(rows), [inspected[split][row] for row in rows]
    if check_only or home is None:
        return None
    directory = _store(listing, splits, inspected, out, report)
    journal.unlink(missing_ok=True)
    say(
        f"{directory}: {sum(len(part.ids) for part in splits.values()):,} images.\n"
        f"Train on it: {_training_command(listing.name, out)}"
    )
    return directory


def _training_command(name: str, out: pathlib.Path) -> str:
    config = _CONFIGS.get(name, "coco")
    named = "" if name in _CONFIGS else f"--config.data.name={name} "
    return (
        f"python -m clsl_jax.main --config=configs/{config}.py {named}"
        f"--config.data.dir={shlex.quote(str(out))} --workdir=RUN"
    )


def _inspect(
    splits: Mapping[str, ImageList], workers: int, journal: pathlib.Path | None
) -> dict[pathlib.Path, Inspected]:
    paths = [path for part in splits.values() for path in part.paths]
    with _progress("checking images", len(paths)) as advance:
        found = inspection.inspect_images(paths, workers=workers, journal=journal, advance=advance)
    return dict(zip(paths, found, strict=True))


def _with_test_split(
    listing: Listing, inspected: Mapping[pathlib.Path, Inspected], fraction: float, seed: int
) -> tuple[dict[str, ImageList], list[str]]:
    """Returns the splits, with one for testing taken from `train` if there is none."""
    splits = dict(listing.splits)
    if "train" not in splits:
        raise InputError(f"{listing.name}: no image is for training (split train).")
    if "test" in splits:
        return splits, []
    train = splits["train"]
    groups = np.array([inspected[path].sha256 or str(path) for path in train.paths])
    kept, held = stratified_split(train.labels, fraction, seed, groups)
    if not len(held):
        raise InputError(
            f"{listing.name}: {len(train.ids)} images are too few to hold out {fraction:.0%} for "
            "testing; name a split column, or a larger --test_fraction."
        )
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


def _store(
    listing: Listing,
    splits: Mapping[str, ImageList],
    inspected: Mapping[str, Sequence[Inspected]],
    out: pathlib.Path,
    report: Mapping,
) -> pathlib.Path:
    content = verification.content_sha256(listing.class_names, splits, inspected)
    final = out / listing.name / _CONFIG / _VERSION
    if os.path.isdir(final) and stored.open_prepared(final).facts.get("content_sha256") != content:
        raise InputError(f"{final} holds other images or labels: delete it, or name another --out.")

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
        "unknown).",
    )
    flags.DEFINE_float(
        "test_fraction", 0.2, "table: share held out for testing if no split is.", 0.0, 0.9
    )
    flags.DEFINE_integer("seed", 0, "table: of that split.", lower_bound=0)


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
    )


def _work(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    command_line.refuse_arguments(arguments)
    check_only = values["check-only"].value
    command_line.require(values, "dataset", "NAME", f"one of {', '.join(PREPARED_NAMES)}")
    command_line.require(values, "source", "PATH", "the folder that holds its files")
    if not check_only:
        command_line.require(values, "out", "DIR", "the directory to prepare it in")
    command_line.refuse_foreign(values, "dataset", _BELONGS_TO)
    for name, allowed in (("leave_out", LEAVE_OUT), ("cells", tuple(table.WORDS))):
        if unknown := set(values[name].value) - set(allowed):
            raise InputError(
                f"--{name}={sorted(unknown)[0]!r} is unknown; choose of {', '.join(allowed)}."
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
