"""Means of the study's runs, from the table of single runs that is kept with the documentation.

    PYTHONPATH=. python benchmarks/study_table.py [--csv=docs/study.csv] [--baseline=known_asl]
        [--picture=FILE]

Prints every method that was run with several seeds at one fraction, with the mean difference to the
baseline and a two-sided t-test paired by seed; what was run again on `scenes`, by the means of
each seed's runs; the ablation of either data set at three known fractions; seed 0 of every method
on `scenes` with moderate co-occurrence, over the known fraction; and how alike the two data sets
rank the methods at 20 % known, with and without the default and those that take unknown labels for
negatives. Several names in one, `clsl,clsl_again`, are each seed's mean over the runs that it has
of them. The picture has the default and known labels alone over the known fraction, and the gain
of the one over the other.
"""

import argparse
import collections
import csv
import pathlib
import statistics
from collections.abc import Iterable

import rounds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from clsl_jax import methods, study_report
from configs.study import photographs, scenes

OURS, KNOWN = "clsl", "known_asl"
CEILING = ("scenes, all", 0.0, "all_known")
SCENES, PHOTOGRAPHS, FRACTION = "scenes, uniform", "table, uniform", 0.2
FRACTIONS = (0.1, 0.2, 0.3)  # of the ablation
# What was run again on `scenes` with moderate co-occurrence, at these fractions: the runs of later
# versions of the program, with seeds 5 to 9 that took no part in tuning, and those of all versions.
LATER = {
    OURS: "clsl_again,clsl_third,clsl_fresh",
    KNOWN: "known_asl_again,known_asl_fresh",
    "alike_last": "alike_last,alike_last_fresh",
    "no_recovery": "no_recovery,no_recovery_fresh",
}
EVERY = LATER | {
    OURS: f"{OURS},{LATER[OURS]}",
    KNOWN: f"{KNOWN},{LATER[KNOWN]}",
    "no_recovery": f"known_product,{LATER['no_recovery']}",
}
# The parts of the ablation: a data set, what its rows are compared with, and the rows; one training
# under two names is one row.
ABLATION = (
    (SCENES, "clsl,clsl_again", (*scenes.CHANGED, "no_recovery,known_product")),
    (SCENES, "bare,bare_again", scenes.ALONE),
    (PHOTOGRAPHS, "every_class", ("clsl", *photographs.CHANGED)),
    (PHOTOGRAPHS, "bare", photographs.ALONE),
)
# What the picture calls each data set.
NAMES = {
    SCENES: "scenes, moderate",
    "scenes-strong, uniform": "scenes, strong",
    PHOTOGRAPHS: "photographs",
}
Runs = dict[tuple[str, float, str], dict[int, float]]


def read(path: pathlib.Path) -> Runs:
    """{("data set, protocol", known fraction, method): {seed: test mAP}}."""
    runs: Runs = collections.defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] != "test":
                raise SystemExit(f"{path} has rows of the split {row['split']}, not of test.")
            name = f"{row['dataset']}, {row['protocol']}"
            key = (name, float(row["known_fraction"] or 0), row["method"])
            runs[key][int(row["seed"])] = float(row["mAP"])
    return runs


def table(runs: Runs, baseline: str, title: str = "Runs with several seeds") -> str:
    """The Markdown table of what has several seeds."""
    lines = []
    for (name, fraction, method), found in sorted(runs.items()):
        if len(found) < 2:
            continue
        line = [f"{name}, {fraction:.0%}" if fraction else name, method, str(len(found))]
        line.append(_spread_of(found))
        against = pooled(runs, name, fraction, baseline)
        seeds = sorted(found.keys() & against.keys())
        if method == baseline or len(seeds) < 2:
            lines.append([*line, "", "", ""])
            continue
        ours, theirs = [found[s] for s in seeds], [against[s] for s in seeds]
        difference, p_value = study_report.paired_test(ours, theirs)
        each = ", ".join(f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True))
        lines.append([*line, f"{difference:+.2f}", f"{p_value:.2g}", each])
    header = ["data, known", "method", "seeds", "test mAP", f"to {baseline}", "p", "each seed"]
    return rounds.markdown(title, header, lines)


def again(runs: Runs, groups: dict[str, str], title: str) -> str:
    """The Markdown tables of methods whose runs are those of several, to known labels and ours."""
    means = {
        (SCENES, fraction, method): pooled(runs, SCENES, fraction, names)
        for fraction in FRACTIONS
        for method, names in groups.items()
    }
    return "\n".join(table(means, baseline, title) for baseline in (KNOWN, OURS))


def pooled(runs: Runs, data: str, fraction: float, names: str) -> dict[int, float]:
    """{seed: mean test mAP of the runs that it has of methods, whose names commas part}."""
    found = collections.defaultdict(list)
    for method in names.split(","):
        for seed, value in runs.get((data, fraction, method), {}).items():
            found[seed].append(value)
    return {seed: statistics.mean(values) for seed, values in found.items()}


def ablation(runs: Runs, name: str, rows: Iterable[str], baseline: str) -> str:
    """The Markdown table of the rows' mean difference to the baseline, which is the first row.

    The number of seeds follows a difference where it is not of five.
    """
    against = {f: pooled(runs, name, f, baseline) for f in FRACTIONS}
    lines = [[f"`{baseline}`", *(_spread_of(against[f]) for f in FRACTIONS)]]
    for row in rows:
        if set(row.split(",")) <= set(baseline.split(",")):
            continue
        line = [f"`{row}`"]
        for fraction in FRACTIONS:
            found = pooled(runs, name, fraction, row)
            seeds = sorted(found.keys() & against[fraction].keys())
            line.append(_difference([found[s] - against[fraction][s] for s in seeds]))
        lines.append(line)
    header = ["test mAP", *(f"{f:.0%} known" for f in FRACTIONS)]
    return rounds.markdown(f"{name}: to {baseline}", header, lines)


def _spread_of(found: dict[int, float]) -> str:
    values = list(found.values())
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _difference(differences: list[float]) -> str:
    if not differences:
        return ""
    text = f"{statistics.mean(differences):+.2f}"
    if len(differences) > 1:
        _, p_value = study_report.paired_test(differences, [0.0] * len(differences))
        text += f", p = {p_value:.2g}"
    return text if len(differences) == 5 else f"{text} ({len(differences)})"


def one_seed(runs: Runs, seed: int) -> str:
    """The Markdown table of one seed of every method over the known fraction, best first."""
    fractions = sorted({f for (name, f, _) in runs if name == SCENES})
    found = {
        method: [runs.get((SCENES, f, method), {}).get(seed) for f in fractions]
        for method in methods.METHODS
    }
    place = fractions.index(FRACTION)
    found = {method: values for method, values in found.items() if values[place] is not None}
    lines = [
        [method, *("" if v is None else f"{v:.2f}" for v in values)]
        for method, values in sorted(found.items(), key=lambda item: -item[1][place])
    ]
    header = ["method", *(f"{f:.0%} known" for f in fractions)]
    return rounds.markdown(f"{NAMES[SCENES]}, seed {seed}", header, lines)


def ranking(runs: Runs, names: Iterable[str]) -> str:
    """Spearman's correlation of the two data sets' mean test mAP over the methods run on both.

    Empty where those are fewer than three.
    """
    both = [
        [runs.get((name, FRACTION, method)) for name in (SCENES, PHOTOGRAPHS)] for method in names
    ]
    pairs = [[statistics.mean(v.values()) for v in pair] for pair in both if all(pair)]
    if len(pairs) < 3:
        return ""
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return (
        f"{SCENES} and {PHOTOGRAPHS}, {FRACTION:.0%}: rank correlation of {len(pairs)} methods "
        f"{found.statistic:.2f} (p = {found.pvalue:.2g})"
    )


def draw(runs: Runs, path: pathlib.Path) -> None:
    """Draws test mAP and what the default gains, mean and standard deviation, in percent.

    A seed that was run again is drawn with the mean of its runs.
    """
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    scores, gains = figure.subplots(1, 2)
    for place, (name, title) in enumerate(NAMES.items()):
        both, repeated = {}, name == SCENES
        for method, style, what in ((OURS, "-", "the default"), (KNOWN, ":", "known labels")):
            both[method] = {
                f: pooled(runs, name, f, EVERY[method] if repeated and f in FRACTIONS else method)
                for (n, f, m) in sorted(runs)
                if (n, m) == (name, method)
            }
            values = [list(v.values()) for v in both[method].values()]
            _spread(scores, both[method], values, f"C{place}{style}", f"{title}: {what}")
        fractions = sorted(both[OURS].keys() & both[KNOWN].keys())
        differences = []
        for fraction in fractions:
            ours, theirs = both[OURS][fraction], both[KNOWN][fraction]
            differences.append([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])
        _spread(gains, fractions, differences, f"C{place}-", title)
    ceiling = statistics.mean(runs[CEILING].values())
    scores.axhline(ceiling, color="0.6", ls="--", label="scenes, moderate: all labels known, ASL")
    scores.set(ylabel="test mAP (%)", title="test mAP")
    gains.axhline(0, color="0.6", ls="--")
    gains.set(ylabel="points of test mAP", title="the default over known labels alone")
    for axes in (scores, gains):
        axes.set(xlabel="known labels (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _spread(
    axes: Axes, fractions: Iterable[float], values: list[list[float]], style: str, label: str
) -> None:
    axes.errorbar(
        [100 * fraction for fraction in fractions],
        [statistics.mean(v) for v in values],
        yerr=[statistics.stdev(v) for v in values],
        fmt=f"{style}o",
        markersize=4,
        capsize=2,
        label=label,
    )


def main() -> None:
    """Prints the table and perhaps draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("docs/study.csv"))
    parser.add_argument("--baseline", default=KNOWN, help="the method compared with")
    parser.add_argument("--picture", type=pathlib.Path)
    options = parser.parse_args()
    runs = read(options.csv)
    print(table(runs, options.baseline))
    print(again(runs, EVERY, "Means of the runs of each seed"))
    print(again(runs, LATER, "The same, of later versions alone"))
    for name, baseline, rows in ABLATION:
        print(ablation(runs, name, rows, baseline))
    print(one_seed(runs, seed=0))
    assume = {n for n, m in methods.METHODS.items() if m.settings.get("recovery.mode") == "assume"}
    print(ranking(runs, methods.METHODS))
    print(ranking(runs, [name for name in methods.METHODS if name not in {OURS, *assume}]))
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
