"""Tables and figures of a study's finished cells.

`study.md` holds the tables for people, `study.csv` one row a cell, `summary.csv` one a method and
setting, `per_class.csv` average precision by class, `study.tex` the main tables. Figures: mAP over
the known fraction, recovery over epochs, reliability of the probabilities. All labels known
(protocol `all`) stands beside the settings of every other protocol: a column, or a line.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np
from rich.console import Console
from scipy import stats
from tabulate import tabulate

from clsl_jax import atomic, experiment, methods, outputs, score
from clsl_jax.data import partial
from clsl_jax.errors import InputError
from clsl_jax.study import COST_NAME, FAILURE_NAME, RESULTS_NAME, Cell, is_finished
from clsl_jax.workdir import Workdir
from clsl_jax.writer import LOG_NAME, read_log

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = "all"  # the protocol that hides nothing
BINS = 15  # of reliability
MOST = 3  # classes that gain or lose most
_RECOVERY = ("positive_precision", "positive_recall", "negative_precision", "coverage")
_DRAWN = {
    "positive_precision": "positives right",
    "positive_recall": "positives found",
    "negative_precision": "negatives right",
}
Setting = tuple[str, str, float | None]  # data set, protocol, known fraction
Looks = Mapping[str, Mapping[str, Any]]  # {method: colour and marker}


@dataclasses.dataclass(frozen=True)
class Found:
    """What one finished cell gave.

    Attributes:
      cell: which.
      mean_ap: of the split that was asked for, in percent.
      class_ap: {class: average precision in percent}.
      epoch: of the weights.
      recovery: [epochs] of {figure: share or None}, against the hidden labels.
      versions: {"python": ..., "backend": ..., package: ...} that it was evaluated with.
      seconds, peak_memory_mib: of the cell's processes, the sum and the largest; nan where a cell
        was not run here.
      confidence, frequency, count: float [BINS]: mean probability, share of positives and number of
        test cells in each bin of probability; all 0 where the predictions that are kept are not of
        this split and these weights.
    """

    cell: Cell
    mean_ap: float
    class_ap: Mapping[str, float]
    epoch: int
    recovery: Sequence[Mapping[str, float | None]]
    versions: Mapping[str, str]
    seconds: float
    peak_memory_mib: float
    confidence: np.ndarray
    frequency: np.ndarray
    count: np.ndarray

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent; nan where no cell was counted."""
        if not self.count.any():
            return float("nan")
        gaps = np.abs(self.confidence - self.frequency)
        return float(100 * np.sum(self.count * gaps) / np.sum(self.count))


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of positives and number of cells in bins of equal width.

    Args:
      probabilities: [N, C] in [0, 1].
      labels: [N, C] in {0, 1}.
      counted: bool [N, C].

    Returns:
      Three float64 [BINS]; 0 where a bin is empty.
    """
    p, y = probabilities[counted].astype(np.float64), labels[counted]
    which = np.minimum((p * BINS).astype(int), BINS - 1)
    count = np.bincount(which, minlength=BINS).astype(np.float64)
    some = np.maximum(count, 1)
    confidence = np.bincount(which, weights=p, minlength=BINS) / some
    return confidence, np.bincount(which, weights=y, minlength=BINS) / some, count


def paired_test(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean difference and two-sided p value of a paired t-test; nan with fewer than two pairs."""
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    if not len(differences):
        return float("nan"), float("nan")
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, float("nan")
    if np.ptp(differences) == 0:  # the test would divide by zero
        return mean, 1.0 if mean == 0 else 0.0
    return mean, float(stats.ttest_rel(ours, theirs).pvalue)


def read(cell: Cell, workdir: str, *, split: str, convention: str, weights: str) -> Found:
    """Returns what a finished cell gave, on the split `test` or `validation`.

    Raises:
      InputError: it has no such split, no mAP of it, or was run with another configuration.
    """
    directory = os.path.join(workdir, cell.directory)
    with open(os.path.join(directory, RESULTS_NAME), encoding="utf-8") as file:
        results = json.load(file)
    asked = {"split": split, "weights": weights, "AP_convention": convention}
    rows = [row for row in results["results"] if asked.items() <= row.items()]
    if not rows:
        raise InputError(
            f"{directory} has no {split} mAP ({weights}, {convention}): its recipe keeps no images "
            "for it (data.validation_fraction)."
        )
    (row,) = rows
    if row["mAP"] is None:
        raise InputError(
            f"{directory} has no {split} mAP: that split has a known positive of no class. Leave "
            "its recipe out of the study, or label some of its images."
        )
    cost = {"seconds": float("nan"), "peak_memory_mib": float("nan")}
    if os.path.exists(os.path.join(directory, COST_NAME)):
        with open(os.path.join(directory, COST_NAME), encoding="utf-8") as file:
            cost = json.load(file)
    log = read_log(os.path.join(directory, LOG_NAME))
    recovery = [
        {name: row.get(f"recovery/{name}") for name in _RECOVERY} | {"epoch": row["epoch"]}
        for row in log
        if "recovery/unknown" in row
    ]
    predictions = score.load_predictions(os.path.join(directory, "predictions.npz"))
    options = experiment.step_options(Workdir.stored_config(directory), steps_per_epoch=1)
    probabilities = np.asarray(outputs.stated_probabilities(predictions["scores"], options))
    counted = (predictions["labels"] >= 0) & ~predictions["ignore"]
    # Predictions are kept of the test split and of the best epoch alone.
    if split != "test" or row["epoch"] != results["selection"]["epochs"]["best"]:
        counted[:] = False
    return Found(
        cell,
        100 * row["mAP"],
        {name: 100 * value for name, value in row["AP"].items() if value is not None},
        row["epoch"],
        recovery,
        results["versions"],
        cost["seconds"],
        cost["peak_memory_mib"],
        *reliability(probabilities, predictions["labels"], counted),
    )


def write(
    study: ml_collections.ConfigDict, grid: Sequence[Cell], workdir: str, console: Console
) -> None:
    """Writes every table and figure of the finished cells into the study's workdir.

    Raises:
      InputError: as `read`, of any cell.
    """
    found = [
        read(cell, workdir, split=study.split, convention=study.convention, weights=study.weights)
        for cell in grid
        if is_finished(cell, workdir)
    ]
    if not found:
        console.print("No cell is finished: there is nothing to report.")
        return
    summary, classes = _summary(found, study), _class_rows(found, study)
    about = (
        f"{study.split.capitalize()} mAP in percent, {study.convention} AP, weights of the "
        f"{study.weights} epoch, mean ± standard deviation over seeds; in brackets the mean "
        f"difference to {study.baseline}, paired by seed, and its p value (two-sided paired "
        "t-test), with the number of pairs where these are fewer than the seeds."
    )
    sections = ["# Study", f"{len(found)} of {len(grid)} cells finished. {about}"]
    latex, dagger = [], "† published, in its authors' setting, not run here; source in the table."
    for title, rows in _main_tables(summary, study):
        published = any("†" in row[0] for row in rows)
        sections += [f"## {title}", _markdown(rows), *([dagger] if published else [])]
        latex.append(_latex(rows, f"{title}. {about}" + (f" {dagger}" if published else "")))
    sections += _details(summary) + _changes(classes, study.baseline)
    sections += ["## Methods", _markdown(_method_rows(grid))]
    sections += _versions(found) + _failures(grid, workdir)
    path = os.path.join(workdir, "study.md")
    atomic.write_text(path, "\n\n".join(sections) + "\n")
    atomic.write_text(os.path.join(workdir, "study.tex"), "\n\n".join(latex) + "\n")
    _write_csv(os.path.join(workdir, "summary.csv"), summary)
    _write_csv(os.path.join(workdir, "study.csv"), [_cell_row(f, study) for f in found])
    _write_csv(os.path.join(workdir, "per_class.csv"), classes)
    for name, figure in _figures(found, summary).items():
        with atomic.replacing(os.path.join(workdir, f"{name}.png")) as file:
            figure.savefig(file, format="png")
    console.print(f"Written: {path}, with CSV, LaTeX and figures beside it.")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    return tabulate(rows, headers="firstrow", tablefmt="pipe", disable_numparse=True)


def _latex(rows: Sequence[Sequence[str]], caption: str) -> str:
    caption = re.sub(r"[%&_#$]", r"\\\g<0>", caption)
    table = tabulate(rows, headers="firstrow", tablefmt="latex_booktabs", disable_numparse=True)
    text = f"\\begin{{table}}\n\\caption{{{caption}}}\n{table}\n\\end{{table}}"
    return text.replace("±", r"$\pm$").replace("†", r"\dag{}")


def _groups(found: Iterable[Found]) -> dict[tuple[Setting, str], list[Found]]:
    groups: dict[tuple[Setting, str], list[Found]] = {}
    for result in found:
        groups.setdefault((result.cell.setting, result.cell.method), []).append(result)
    return groups


def _labels(setting: Setting) -> dict[str, Any]:
    return dict(zip(("dataset", "protocol", "known_fraction"), setting, strict=True))


def _setting(row: Mapping[str, Any]) -> Setting:
    return row["dataset"], row["protocol"], row["known_fraction"]


def _where(setting: Setting) -> str:
    return ", ".join(filter(None, (*setting[:2], _share(setting))))


def _share(setting: Setting) -> str:
    """Returns the known share of labels, nothing where the protocol leaves it open."""
    return "" if setting[2] is None else f"{100 * setting[2]:g} % known"


def _layout(settings: Iterable[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Returns what stands side by side: {(data set, protocol): settings, by fraction}.

    All labels known is the last of each protocol of its data set, by itself where it is alone.
    """
    settings = list(dict.fromkeys(settings))
    partly = {dataset for dataset, protocol, _ in settings if protocol != ALL}
    return {
        (dataset, protocol): sorted(
            (s for s in settings if s[0] == dataset and s[1] in (protocol, ALL)),
            key=lambda s: (s[1] == ALL, s[2] or 0.0),
        )
        for dataset, protocol, _ in settings
        if protocol != ALL or dataset not in partly
    }


def _summary(found: Sequence[Found], study: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    groups, rows = _groups(found), []
    for (setting, method), results in groups.items():
        baseline = groups.get((setting, study.baseline), [])
        theirs = {f.cell.seed: f.mean_ap for f in baseline}
        pairs = [(f.mean_ap, theirs[f.cell.seed]) for f in results if f.cell.seed in theirs]
        difference, p_value = paired_test(*zip(*pairs, strict=True)) if pairs else (np.nan, np.nan)
        values = [f.mean_ap for f in results]
        last = [f.recovery[-1] if f.recovery else {} for f in results]
        rows.append(
            {
                **_labels(setting),
                "method": method,
                "seeds": len(values),
                "mAP": np.mean(values),
                "mAP_sd": np.std(values, ddof=1) if len(values) > 1 else np.nan,
                "difference": difference,
                "p_value": p_value,
                "pairs": len(pairs),
                **{name: _mean(row.get(name) for row in last) for name in _RECOVERY},
                "calibration_error": _mean(f.calibration_error for f in results),
                **_reading(study),
                "seconds": _mean(f.seconds for f in results),
                "peak_memory_mib": _mean(f.peak_memory_mib for f in results),
            }
        )
    return rows


def _reading(study: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns which average precision of which weights and split the numbers are."""
    return {"split": study.split, "AP_convention": study.convention, "weights": study.weights}


def _mean(values: Iterable[float | None]) -> float:
    """Returns the mean of those that there are: neither None nor NaN."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _main_tables(
    summary: Sequence[Mapping[str, Any]], study: ml_collections.ConfigDict
) -> list[tuple[str, list[list[str]]]]:
    """Returns (title, rows with a header) for each data set and protocol."""
    entries = [(_setting(r), r["method"], _shown(r, study.baseline)) for r in summary]
    entries.sort(key=lambda entry: entry[0][1] == ALL)  # the last rows
    run = {setting[:2] for setting, _, _ in entries}
    for name, dataset, protocol, fraction, percent, source in study.published:
        if (dataset, protocol) in run:
            # A protocol without a fraction has one column, whatever was written there.
            known = fraction if protocol in partial.BY_FRACTION else None
            setting = (dataset, protocol, known)
            entries.append((setting, f"{name} † ({source})", f"{percent:.1f}"))
    tables = []
    for (dataset, protocol), columns in _layout(setting for setting, _, _ in entries).items():
        cell_of = {(row, setting): text for setting, row, text in entries if setting in columns}
        heads = ["all known" if c[1] == ALL else _share(c) or f"{study.split} mAP" for c in columns]
        rows = [["method", *heads]]
        for row in dict.fromkeys(row for row, _ in cell_of):
            rows.append([row, *(cell_of.get((row, c), "") for c in columns)])
        tables.append((f"{dataset}, labels known by protocol {protocol}", rows))
    return tables


def _shown(row: Mapping[str, Any], baseline: str) -> str:
    text = f"{row['mAP']:.2f}"
    if row["seeds"] > 1:
        text += f" ± {row['mAP_sd']:.2f}"
    if row["method"] != baseline and np.isfinite(row["difference"]):
        p_value = row["p_value"]
        chance = f", p = {p_value:.2g}" if np.isfinite(p_value) else ""
        fewer = row["pairs"] < row["seeds"]
        pairs = f", {row['pairs']} pair{'s' * (row['pairs'] > 1)}" if fewer else ""
        text += f" ({row['difference']:+.2f}{chance}{pairs})"
    return text


def _details(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of recovery, calibration and cost."""
    rows = [
        [
            "data, protocol, known",
            "method",
            "seeds",
            "positives right",
            "positives found",
            "negatives right",
            "cells recovered",
            "calibration error",
            "seconds",
            "MiB",
        ]
    ]
    for r in summary:
        shares = [f"{100 * r[name]:.1f} %" if np.isfinite(r[name]) else "" for name in _RECOVERY]
        costs = [
            f"{r[k]:,.0f}" if np.isfinite(r[k]) else "" for k in ("seconds", "peak_memory_mib")
        ]
        error = r["calibration_error"]
        error = f"{error:.2f} %" if np.isfinite(error) else ""
        rows.append([_where(_setting(r)), r["method"], str(r["seeds"]), *shares, error, *costs])
    about = (
        "Recovered labels of the last epoch against the hidden ones, means of the seeds that "
        "recovered any; nothing where a method makes its targets within a step and keeps none. "
        f"Expected calibration error of the test probabilities in {BINS} bins, where those of this "
        "split and these weights were kept; time and peak memory (of the host, not of an "
        "accelerator) of a cell's processes."
    )
    return ["## Recovery, calibration, cost", about, _markdown(rows)]


def _changes(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Returns the table of the classes that gain and lose most by each method; rows: by class."""
    groups: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for r in rows:
        if r["pairs"] and r["method"] != baseline:
            key = (_where(_setting(r)), r["method"])
            groups.setdefault(key, []).append((r["class"], r["gain"]))
    table = [["data, protocol, known", "method", "gain most", "lose most"]]
    for key, gains in groups.items():
        gains.sort(key=lambda gain: -gain[1])
        most = [gain for gain in gains[:MOST] if gain[1] > 0]
        least = [gain for gain in gains[: -MOST - 1 : -1] if gain[1] < 0]
        table.append(
            [*key, *(", ".join(f"{name} {x:+.2f}" for name, x in some) for some in (most, least))]
        )
    about = (
        f"Mean difference of average precision to {baseline}, in points, paired by seed: the "
        f"{MOST} classes at either end. All of them: `per_class.csv`."
    )
    return ["## Classes", _markdown(table), about] if groups else []


def _method_rows(grid: Sequence[Cell]) -> list[list[str]]:
    rows = [["method", "what", "source", "note"]]
    for name in dict.fromkeys(cell.method for cell in grid):
        method = methods.METHODS.get(name)
        rows.append(
            [name, method.title, method.source, method.note]
            if method
            else [name, "a variant of this study", "", ""]
        )
    return rows


def _versions(found: Sequence[Found]) -> list[str]:
    """Returns what the cells were evaluated with; a table where that is not the same for all."""
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for f in found:
        groups.setdefault(tuple(sorted(f.versions.items())), []).append(f.cell)
    if len(groups) == 1:
        (versions,) = groups
        return ["## Versions", ", ".join(f"{name} {version}" for name, version in versions)]
    names = sorted({name for versions in groups for name, _ in versions})
    rows = [["cells", *names, "for example"]]
    for versions, cells in sorted(groups.items(), key=lambda item: -len(item[1])):
        told = [dict(versions).get(name, "") for name in names]
        rows.append([str(len(cells)), *told, cells[0].directory])
    note = "The cells were not all evaluated with the same, by which figures may differ."
    return ["## Versions", note, _markdown(rows)]


def _failures(grid: Sequence[Cell], workdir: str) -> list[str]:
    rows = []
    for cell in grid:
        path = os.path.join(workdir, cell.directory, FAILURE_NAME)
        # Another job may have finished what this one failed at.
        done = os.path.exists(os.path.join(workdir, cell.directory, RESULTS_NAME))
        if os.path.exists(path) and not done:
            with open(path, encoding="utf-8") as file:
                rows.append(f"- {cell.directory}: {file.read().strip()}")
    return ["## Failed cells", "\n".join(rows)] if rows else []


def _cell_row(found: Found, study: ml_collections.ConfigDict) -> dict[str, Any]:
    cell, last = found.cell, found.recovery[-1] if found.recovery else {}
    return {
        **_labels(cell.setting),
        "method": cell.method,
        "seed": cell.seed,
        "mAP": found.mean_ap,
        **_reading(study),
        "epoch": found.epoch,
        **{name: last.get(name) for name in _RECOVERY},
        "calibration_error": found.calibration_error,
        "seconds": found.seconds,
        "peak_memory_mib": found.peak_memory_mib,
        "version": found.versions.get("clsl_jax", ""),
        "settings": " ".join(cell.settings),
    }


def _class_rows(found: Sequence[Found], study: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    groups, rows = _groups(found), []
    for (setting, method), results in groups.items():
        baseline = groups.get((setting, study.baseline), [])
        theirs = {f.cell.seed: f.class_ap for f in baseline}
        for name in dict.fromkeys(name for f in results for name in f.class_ap):
            gains = [
                f.class_ap[name] - theirs[f.cell.seed][name]
                for f in results
                if name in f.class_ap and name in theirs.get(f.cell.seed, {})
            ]
            rows.append(
                {
                    **_labels(setting),
                    "method": method,
                    "class": name,
                    "AP": _mean(f.class_ap.get(name) for f in results),
                    **_reading(study),
                    "gain": _mean(gains),
                    "pairs": len(gains),
                }
            )
    return rows


def _write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _plain(value) for key, value in row.items()})
    atomic.write_text(path, text.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{float(value):.6g}"
    return value


def _figures(found: Sequence[Found], summary: Sequence[Mapping[str, Any]]) -> dict[str, "Figure"]:
    """Returns the figures by name; a method looks the same in all of them."""
    looks = {m: _style(i) for i, m in enumerate(dict.fromkeys(r["method"] for r in summary))}
    figures = {
        "curves": _curves(summary, looks),
        "recovery": _recovery(found, looks),
        "reliability": _reliability(found, looks),
    }
    for figure in figures.values():
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            if not axes.get_subplotspec().is_first_col():
                axes.set_ylabel("")
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            figure.legend(
                handles.values(),
                handles,
                loc="outside right center",
                fontsize="x-small",
                ncols=-(-len(handles) // 18),
            )
    return figures


def _style(index: int) -> dict[str, Any]:
    """Returns colour and marker of a method, another pair for each of forty."""
    return {"color": f"C{index % 10}", "marker": "osD^"[index // 10 % 4], "markersize": 4}


def _curves(summary: Sequence[Mapping[str, Any]], looks: Looks) -> "Figure":
    """Draws mAP over the known fraction, a panel for each data set and protocol."""
    layout = _layout(map(_setting, summary))
    figure = _figure(5.0 * len(layout), 4.0)
    for axes, (title, settings) in zip(
        figure.subplots(1, len(layout), squeeze=False)[0], layout.items(), strict=True
    ):
        rows = [r for s in settings for r in summary if _setting(r) == s]
        for method in dict.fromkeys(r["method"] for r in summary):
            mine = [r for r in rows if r["method"] == method and r["protocol"] != ALL]
            if mine:
                axes.errorbar(
                    [100 * (r["known_fraction"] or 0.0) for r in mine],
                    [r["mAP"] for r in mine],
                    yerr=[0.0 if np.isnan(r["mAP_sd"]) else r["mAP_sd"] for r in mine],
                    capsize=2,
                    label=method,
                    **looks[method],
                )
        for r in rows:
            if r["protocol"] == ALL:
                label = f"{r['method']}, protocol {ALL}"
                axes.axhline(r["mAP"], color=looks[r["method"]]["color"], ls="--", label=label)
        split = rows[0]["split"]
        axes.set(xlabel="known labels (%)", ylabel=f"{split} mAP (%)", title=", ".join(title))
        if not any(r["known_fraction"] for r in rows):
            axes.set(xlabel="", xticks=[])
    return figure


def _recovery(found: Sequence[Found], looks: Looks) -> "Figure":
    """Draws what was recovered, against the hidden labels: a row for each share of it."""
    figure, panels = _panels([f for f in found if f.recovery], "recovered labels", len(_DRAWN))
    for column, mine in panels:
        for axes, (name, what) in zip(column, _DRAWN.items(), strict=True):
            if axes is not column[0]:
                axes.sharex(column[0])
            for method, runs in mine.items():
                steps = list(zip(*(f.recovery for f in runs), strict=False))
                epochs = [rows[0]["epoch"] for rows in steps]
                means = [100 * _mean(row[name] for row in rows) for rows in steps]
                axes.plot(epochs, means, label=method, markevery=3, **looks[method])
            axes.set(ylabel=f"{what} (%)")
            if name != "negative_precision":  # that is near 100 %, and seen there only
                axes.set(ylim=(0, 100))
            axes.xaxis.get_major_locator().set_params(integer=True)
        column[-1].set(xlabel="epoch")
    return figure


def _reliability(found: Sequence[Found], looks: Looks) -> "Figure":
    """Draws the share of positives over the probability, both by bins."""
    figure, panels = _panels(
        [f for f in found if f.count.any()], "predictions of this split and these weights"
    )
    for (axes,), mine in panels:
        axes.plot((0, 1), (0, 1), color="0.7")
        for method, runs in mine.items():
            count = np.sum([f.count for f in runs], axis=0)
            some = count > 0
            sums = (
                np.sum([f.count * getattr(f, name) for f in runs], axis=0)[some] / count[some]
                for name in ("confidence", "frequency")
            )
            axes.plot(*sums, label=method, **looks[method])
        axes.set(xlabel="probability", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width + 1.5, height), dpi=120, layout="constrained")


def _panels(
    found: Sequence[Found], what: str, count: int = 1
) -> tuple["Figure", list[tuple[Sequence["Axes"], dict[str, list[Found]]]]]:
    """Lays out a column of panels for each setting, in rows for each data set and protocol.

    Where each of these has a single setting, they stand side by side.

    Args:
      found: what is drawn.
      what: that is said to be missing where there is none.
      count: panels in each column.

    Returns:
      (figure, [(axes [count], {method: its runs}), ...]).
    """
    groups = _groups(found)
    layout = list(_layout(setting for setting, _ in groups).values())
    if layout and max(map(len, layout)) == 1:
        layout = [[setting for (setting,) in layout]]
    rows, columns = count * len(layout), max(map(len, layout), default=1)
    figure = _figure(2.6 * columns, 2.2 * max(rows, 1) + 0.4)
    if not found:
        figure.text(0.5, 0.5, f"There are no {what}.", ha="center")
        return figure, []
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    panels = []
    for first, settings in zip(range(0, rows, count), layout, strict=True):
        for axes in grid[first : first + count, len(settings) :].flat:
            axes.set_visible(False)
        for column, setting in enumerate(settings):
            axes = grid[first : first + count, column]
            axes[0].set_title(_where(setting), fontsize="small")
            mine = {method: runs for (of, method), runs in groups.items() if of == setting}
            panels.append((axes, mine))
    return figure, panels
