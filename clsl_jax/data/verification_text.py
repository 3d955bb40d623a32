"""The report on a data set, for a person."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from clsl_jax.data.inspection import DAMAGED, MISSING, UNREADABLE
from clsl_jax.errors import listed

# Lines of a list; report.json has all of them.
_SHOWN = 10
_WIDTH = 100
# Classes beyond which only the rarest are shown.
_CLASSES_SHOWN = 100
# What may have been published.
_COUNTS = (
    ("images", "images"),
    ("images without a positive or unknown label", "without_labels"),
    ("positive labels", "labels"),
)


def report_text(report: Mapping[str, Any]) -> str:
    """Returns the report of `verification.build_report` as plain text, mostly 100 columns wide."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=_WIDTH, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(f"{report['dataset']} from {report['source']}", soft_wrap=True)
    console.print(f"{_compared(report['classes'])} classes")
    console.print(_split_table(report))
    if report["pixels"]:
        sizes = ", ".join(f"{name} {w} x {h}" for name, (w, h) in report["pixels"].items())
        modes = ", ".join(f"{count:,} {mode}" for mode, count in report["modes"].items())
        console.print(f"Pixels: {sizes}. Colours: {modes}.", soft_wrap=True)
    table, title = _class_table(report)
    console.print(title)
    console.print(table)
    for line in [*_findings(report), *(f"Note: {note}" for note in report["notes"])]:
        console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _compared(count: Mapping[str, int | None]) -> str:
    found, published = count["found"], count["published"]
    if published is None:
        return f"{found:,}"
    if found == published:
        return f"{found:,} (as published)"
    return f"{found:,} (published: {published:,})"


def _split_table(report: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    for split in report["splits"]:
        table.add_column(split, justify="right")
    parts = list(report["splits"].values())
    for title, key in _COUNTS:
        table.add_row(title, *(_compared(part[key]) for part in parts))
    cells = [max(part["images"]["found"] * report["classes"]["found"], 1) for part in parts]
    for title, key in (
        ("negative labels", "negative"),
        ("unknown labels", "unknown"),
        ("difficult labels", "difficult"),
    ):
        shares = zip(parts, cells, strict=True)
        table.add_row(title, *(f"{part[key]:,} ({part[key] / n:.1%})" for part, n in shares))
    for title, key in (
        ("missing images", MISSING),
        ("unreadable images", UNREADABLE),
        ("damaged images, used as they are", DAMAGED),
    ):
        table.add_row(title, *(f"{len(part[key]):,}" for part in parts))
    return table


def _class_table(report: Mapping[str, Any]) -> tuple[Table, str]:
    counts = {split: part["per_class"] for split, part in report["splits"].items()}
    first = next(iter(counts.values()))
    names = list(first)
    title = "Labels of each class, positive / negative"
    if any(part[state] for part in report["splits"].values() for state in (MISSING, UNREADABLE)):
        title += ", of images that can be read"
    if len(names) > _CLASSES_SHOWN:
        total = {name: sum(part[name]["positive"] for part in counts.values()) for name in names}
        names = sorted(names, key=lambda name: total[name])[:_CLASSES_SHOWN]
        title += f", the {_CLASSES_SHOWN} rarest classes"
    table = Table()
    table.add_column("class")
    for split in counts:
        table.add_column(split, justify="right")
    for name in names:
        shown = (f"{p[name]['positive']:,} / {p[name]['negative']:,}" for p in counts.values())
        table.add_row(name, *shown)
    return table, title + ":"


def _findings(report: Mapping[str, Any]) -> list[str]:
    """Returns what a reader should know, most serious first."""
    lines: list[str] = []
    counts = {"classes": report["classes"]} | {
        f"{what} in {split}": part[key]
        for split, part in report["splits"].items()
        for what, key in _COUNTS
    }
    wrong = [
        name for name, count in counts.items() if count["published"] not in (None, count["found"])
    ]
    if wrong:
        lines.append(f"Not the published number of {', '.join(wrong)}.")
    for split, part in report["splits"].items():
        for state, what in (
            (UNREADABLE, "that cannot be read"),
            (MISSING, "that are missing"),
            (DAMAGED, "that are damaged, and used as they decode"),
        ):
            found = [f"{image['path']}: {image['reason']}" for image in part[state]]
            lines += _listed(f"Images in {split} {what}", found)
    leaks = [_places(places) for places in report["leaks"]]
    lines += _listed("Images that several splits share", leaks)
    copies = [_places(places) for places in report["duplicates"]]
    lines += _listed("Images that a split has more than once", copies)
    for split, part in report["splits"].items():
        empty = [name for name, count in part["per_class"].items() if not count["positive"]]
        if empty:
            shown = listed(empty, _SHOWN)
            classes = "1 class" if len(empty) == 1 else f"{len(empty):,} classes"
            lines.append(f"{classes} without a positive label in {split}: {shown}")
    return lines or ["No image is missing, unreadable, damaged or there twice."]


def _places(places: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{split}: {', '.join(names)}" for split, names in places.items())


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  … {len(entries) - _SHOWN:,} more in report.json"] if len(entries) > _SHOWN else []
    return [f"{title}: {len(entries):,}", *(f"  {entry}" for entry in entries[:_SHOWN]), *more]
