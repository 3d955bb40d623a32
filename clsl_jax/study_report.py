"""Tables and figures of a study's finished cells.

`study.md` holds the tables for people, `study.csv` one row a cell, `summary.csv` one a method and
setting, `per_class.csv` average precision by class, `study.tex` the main tables. Figures: mAP over
the known fraction, recovery over epochs, reliability of the probabilities.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console
from scipy import stats
from tabulate import tabulate

from clsl_jax import atomic, experiment, methods, score, steps
from clsl_jax.data import partial
from clsl_jax.study import COST_NAME, FAILURE_NAME, RESULTS_NAME, Cell, is_finished
from clsl_jax.workdir import Workdir
from clsl_jax.writer import LOG_NAME, read_log

BINS = 15  # of reliability
_RECOVERY = ("positive_precision", "positive_recall", "negative_precision", "coverage")


@dataclasses.dataclass(frozen=True)
class Found:
    """What one finished cell gave.

    Attributes:
      cell: which.
      mean_ap: of the test split, in percent.
      class_ap: {class: average precision in percent}.
      epoch: of the weights.
      recovery: [epochs] of {figure: share or None}, against the hidden labels.
      seconds, peak_memory_mib: of the cell's processes, the sum and the largest; nan where a cell
        was not run here.
      confidence, frequency, count: float [BINS]: mean probability, share of positives and number of
        test cells in each bin of probability; all 0 where the predictions that are kept are not of
        these weights.
    """

    cell: Cell
    mean_ap: float
    class_ap: Mapping[str, float]
    epoch: int
    recovery: Sequence[Mapping[str, float | None]]
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


def read(cell: Cell, workdir: str, *, convention: str, weights: str) -> Found:
    """Returns what a finished cell gave."""
    directory = os.path.join(workdir, cell.directory)
    with open(os.path.join(directory, RESULTS_NAME), encoding="utf-8") as file:
        results = json.load(file)
    row = next(
        row
        for row in results["results"]
        if row["split"] == "test"
        and row["weights"] == weights
        and row["AP_convention"] == convention
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
    probabilities = np.asarray(steps.stated_probabilities(predictions["scores"], options))
    counted = (predictions["labels"] >= 0) & ~predictions["ignore"]
    if row["epoch"] != results["selection"]["epochs"]["best"]:  # theirs alone are kept
        counted[:] = False
    return Found(
        cell,
        100 * row["mAP"],
        {name: 100 * value for name, value in row["AP"].items() if value is not None},
        row["epoch"],
        recovery,
        cost["seconds"],
        cost["peak_memory_mib"],
        *reliability(probabilities, predictions["labels"], counted),
    )


def write(
    study: ml_collections.ConfigDict, grid: Sequence[Cell], workdir: str, console: Console
) -> None:
    """Writes every table and figure of the finished cells into the study's workdir.

    Raises:
      InputError: a cell was run with another configuration.
    """
    found = [
        read(cell, workdir, convention=study.convention, weights=study.weights)
        for cell in grid
        if is_finished(cell, workdir)
    ]
    if not found:
        console.print("No cell is finished: there is nothing to report.")
        return
    summary = _summary(found, study)
    about = (
        f"Test mAP in percent, {study.convention} AP, weights of the {study.weights} epoch, mean ± "
        "standard deviation over seeds; in brackets the mean difference to "
        f"{study.baseline}, paired by seed, and its p value (two-sided paired t-test), with the "
        "number of pairs where these are fewer than the seeds."
    )
    sections = ["# Study", f"{len(found)} of {len(grid)} cells finished. {about}"]
    latex = []
    for title, rows in _main_tables(summary, study):
        sections += [f"## {title}", _markdown(rows)]
        latex.append(_latex(rows, f"{title}. {about}"))
    if study.published:
        sections.append("† published, in its authors' setting, not run here; source in the table.")
    sections += _details(summary)
    sections += ["## Methods", _markdown(_method_rows(grid))]
    sections += _failures(grid, workdir)
    path = os.path.join(workdir, "study.md")
    atomic.write_text(path, "\n\n".join(sections) + "\n")
    atomic.write_text(os.path.join(workdir, "study.tex"), "\n\n".join(latex) + "\n")
    _write_csv(os.path.join(workdir, "summary.csv"), summary)
    _write_csv(os.path.join(workdir, "study.csv"), [_cell_row(f, study) for f in found])
    _write_csv(os.path.join(workdir, "per_class.csv"), _class_rows(found, study))
    _figures(found, summary, workdir)
    console.print(f"Written: {path}, with CSV, LaTeX and figures beside it.")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    return tabulate(rows, headers="firstrow", tablefmt="pipe", disable_numparse=True)


def _latex(rows: Sequence[Sequence[str]], caption: str) -> str:
    caption = re.sub(r"[%&_#$]", r"\\\g<0>", caption).replace("±", r"$\pm$")
    table = tabulate(rows, headers="firstrow", tablefmt="latex_booktabs", disable_numparse=True)
    table = table.replace("±", r"$\pm$").replace("†", r"\dag{}")
    return f"\\begin{{table}}\n\\caption{{{caption}}}\n{table}\n\\end{{table}}"


def _groups(found: Iterable[Found]) -> dict[tuple[str, str, float, str], list[Found]]:
    groups: dict[tuple[str, str, float, str], list[Found]] = {}
    for result in found:
        cell = result.cell
        key = (cell.dataset, cell.protocol, cell.known_fraction, cell.method)
        groups.setdefault(key, []).append(result)
    return groups


def _summary(found: Sequence[Found], study: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    groups, rows = _groups(found), []
    for (dataset, protocol, fraction, method), results in groups.items():
        baseline = groups.get((dataset, protocol, fraction, study.baseline), [])
        theirs = {f.cell.seed: f.mean_ap for f in baseline}
        pairs = [(f.mean_ap, theirs[f.cell.seed]) for f in results if f.cell.seed in theirs]
        difference, p_value = paired_test(*zip(*pairs, strict=True)) if pairs else (np.nan, np.nan)
        values = [f.mean_ap for f in results]
        last = [f.recovery[-1] if f.recovery else {} for f in results]
        rows.append(
            {
                "dataset": dataset,
                "protocol": protocol,
                "known_fraction": fraction,
                "method": method,
                "seeds": len(values),
                "mAP": np.mean(values),
                "mAP_sd": np.std(values, ddof=1) if len(values) > 1 else np.nan,
                "difference": difference,
                "p_value": p_value,
                "pairs": len(pairs),
                **{name: _mean(row.get(name) for row in last) for name in _RECOVERY},
                "calibration_error": np.mean([f.calibration_error for f in results]),
                **_reading(study),
                "seconds": np.mean([f.seconds for f in results]),
                "peak_memory_mib": np.mean([f.peak_memory_mib for f in results]),
            }
        )
    return rows


def _reading(study: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns which average precision of which weights the numbers are."""
    return {"AP_convention": study.convention, "weights": study.weights}


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _main_tables(
    summary: Sequence[Mapping[str, Any]], study: ml_collections.ConfigDict
) -> list[tuple[str, list[list[str]]]]:
    """Returns (title, rows with a header) for each data set and protocol."""
    tables = []
    for dataset, protocol in dict.fromkeys((r["dataset"], r["protocol"]) for r in summary):
        mine = [r for r in summary if (r["dataset"], r["protocol"]) == (dataset, protocol)]
        published = [p for p in study.published if tuple(p[1:3]) == (dataset, protocol)]
        if protocol not in partial.BY_FRACTION:  # one column, whatever was written there
            published = [(*p[:3], mine[0]["known_fraction"], *p[4:]) for p in published]
        fractions = sorted({r["known_fraction"] for r in mine} | {p[3] for p in published})
        cell_of = {(r["method"], r["known_fraction"]): _shown(r, study.baseline) for r in mine}
        shares = [_share(protocol, f) for f in fractions]
        rows = [["method", *(f"{share} known" if share else "test mAP" for share in shares)]]
        for method in dict.fromkeys(r["method"] for r in mine):
            rows.append([method, *(cell_of.get((method, f), "") for f in fractions)])
        for name, source in dict.fromkeys((p[0], p[5]) for p in published):
            given = {p[3]: f"{p[4]:.1f}" for p in published if (p[0], p[5]) == (name, source)}
            rows.append([f"{name} † ({source})", *(given.get(f, "") for f in fractions)])
        tables.append((f"{dataset}, labels known by protocol {protocol}", rows))
    return tables


def _share(protocol: str, fraction: float) -> str:
    """Returns the known share of labels, nothing where the protocol leaves it open."""
    return f"{100 * fraction:g} %" if protocol in partial.BY_FRACTION else ""


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
        share = _share(r["protocol"], r["known_fraction"])
        where = ", ".join(filter(None, (r["dataset"], r["protocol"], share)))
        error = r["calibration_error"]
        error = f"{error:.2f} %" if np.isfinite(error) else ""
        rows.append([where, r["method"], str(r["seeds"]), *shares, error, *costs])
    about = (
        "Recovered labels of the last epoch against the hidden ones; expected calibration error of "
        f"the test probabilities in {BINS} bins, where those of these weights were kept; time and "
        "peak memory of a cell's processes."
    )
    return ["## Recovery, calibration, cost", about, _markdown(rows)]


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


def _failures(grid: Sequence[Cell], workdir: str) -> list[str]:
    rows = []
    for cell in grid:
        path = os.path.join(workdir, cell.directory, FAILURE_NAME)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                rows.append(f"- {cell.directory}: {file.read().strip()}")
    return ["## Failed cells", "\n".join(rows)] if rows else []


def _cell_row(found: Found, study: ml_collections.ConfigDict) -> dict[str, Any]:
    cell, last = found.cell, found.recovery[-1] if found.recovery else {}
    return {
        "dataset": cell.dataset,
        "protocol": cell.protocol,
        "known_fraction": cell.known_fraction,
        "method": cell.method,
        "seed": cell.seed,
        "mAP": found.mean_ap,
        **_reading(study),
        "epoch": found.epoch,
        **{name: last.get(name) for name in _RECOVERY},
        "calibration_error": found.calibration_error,
        "seconds": found.seconds,
        "peak_memory_mib": found.peak_memory_mib,
        "settings": " ".join(cell.settings),
    }


def _class_rows(found: Sequence[Found], study: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    groups, rows = _groups(found), []
    for (dataset, protocol, fraction, method), results in groups.items():
        baseline = groups.get((dataset, protocol, fraction, study.baseline), [])
        theirs = {f.cell.seed: f.class_ap for f in baseline}
        for name in dict.fromkeys(name for f in results for name in f.class_ap):
            gains = [
                f.class_ap[name] - theirs[f.cell.seed][name]
                for f in results
                if name in f.class_ap and name in theirs.get(f.cell.seed, {})
            ]
            rows.append(
                {
                    "dataset": dataset,
                    "protocol": protocol,
                    "known_fraction": fraction,
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
        if row["protocol"] not in partial.BY_FRACTION:
            row = {**row, "known_fraction": ""}
        writer.writerow({key: _plain(value) for key, value in row.items()})
    atomic.write_text(path, text.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{float(value):.6g}"
    return value


def _figures(found: Sequence[Found], summary: Sequence[Mapping[str, Any]], workdir: str) -> None:
    """Draws a panel for each data set and protocol in each figure."""
    panels = list(dict.fromkeys((r["dataset"], r["protocol"]) for r in summary))

    def curves(axes: Any, panel: tuple[str, str]) -> None:
        mine = [r for r in summary if (r["dataset"], r["protocol"]) == panel]
        for index, method in enumerate(dict.fromkeys(r["method"] for r in mine)):
            rows = sorted((r for r in mine if r["method"] == method), key=_fraction)
            axes.errorbar(
                [100 * r["known_fraction"] for r in rows],
                [r["mAP"] for r in rows],
                yerr=[0.0 if np.isnan(r["mAP_sd"]) else r["mAP_sd"] for r in rows],
                capsize=2,
                label=method,
                **_style(index),
            )
        axes.set(xlabel="known labels (%)", ylabel="test mAP (%)")
        if panel[1] not in partial.BY_FRACTION:
            axes.set(xlabel="", xticks=[])

    def recovery(axes: Any, panel: tuple[str, str]) -> None:
        mine = [f for f in found if (f.cell.dataset, f.cell.protocol) == panel and f.recovery]
        if not mine:
            axes.text(0.5, 0.5, "nothing was recovered", ha="center", transform=axes.transAxes)
            return
        smallest = min(f.cell.known_fraction for f in mine)
        mine = [f for f in mine if f.cell.known_fraction == smallest]
        for index, method in enumerate(dict.fromkeys(f.cell.method for f in mine)):
            runs = [f.recovery for f in mine if f.cell.method == method]
            for name, style in (("positive_precision", "-"), ("positive_recall", "--")):
                means = [
                    100 * _mean(row[name] for row in rows) for rows in zip(*runs, strict=False)
                ]
                label = f"{method}: {'right' if style == '-' else 'found'}"
                epochs = [row["epoch"] for row in runs[0]][: len(means)]
                axes.plot(epochs, means, ls=style, markevery=3, label=label, **_style(index))
        axes.set(xlabel=_xlabel("epoch", panel, smallest), ylabel="positives (%)", ylim=(0, 100))
        axes.xaxis.get_major_locator().set_params(integer=True)

    def calibration(axes: Any, panel: tuple[str, str]) -> None:
        mine = [f for f in found if (f.cell.dataset, f.cell.protocol) == panel]
        smallest = min(f.cell.known_fraction for f in mine)
        mine = [f for f in mine if f.cell.known_fraction == smallest]
        axes.plot((0, 1), (0, 1), color="0.7")
        for index, method in enumerate(dict.fromkeys(f.cell.method for f in mine)):
            runs = [f for f in mine if f.cell.method == method]
            count = np.sum([f.count for f in runs], axis=0)
            some = count > 0
            if not some.any():
                continue
            sums = (
                np.sum([f.count * getattr(f, name) for f in runs], axis=0)[some] / count[some]
                for name in ("confidence", "frequency")
            )
            axes.plot(*sums, label=method, **_style(index))
        axes.set(
            xlabel=_xlabel("probability", panel, smallest),
            ylabel="share of positives",
            xlim=(0, 1),
            ylim=(0, 1),
        )

    for name, draw in (("curves", curves), ("recovery", recovery), ("reliability", calibration)):
        _draw(os.path.join(workdir, f"{name}.png"), panels, draw)


def _xlabel(what: str, panel: tuple[str, str], fraction: float) -> str:
    share = _share(panel[1], fraction)
    return f"{what} ({share} known)" if share else what


def _style(index: int) -> dict[str, Any]:
    """Returns colour and marker of a method, another pair for each of forty."""
    return {"color": f"C{index % 10}", "marker": "osD^"[index // 10 % 4], "markersize": 4}


def _fraction(row: Mapping[str, Any]) -> float:
    return row["known_fraction"]


def _draw(
    path: str, panels: Sequence[tuple[str, str]], draw: Callable[[Any, tuple[str, str]], None]
) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7.0 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, panel)
        axes.set_title(", ".join(panel))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
