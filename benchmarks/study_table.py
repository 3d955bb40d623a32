"""Means of the study's runs, from the table of single runs that is kept with the documentation.

    PYTHONPATH=. python benchmarks/study_table.py [--csv=docs/study.csv] [--baseline=known_asl]
        [--picture=FILE]

Prints every method that was run with several seeds at one fraction, with the mean difference to the
baseline and a two-sided t-test paired by seed, and how alike the two data sets rank the methods at
20 % known. The picture has the default and known labels alone over the known fraction, moderate
co-occurrence.
"""

import argparse
import collections
import csv
import pathlib
import statistics

import rounds
from matplotlib.figure import Figure
from scipy import stats

from clsl_jax import methods, study_report

OURS = "clsl"
CEILING = ("scenes, all", 0.0, "all_known")
SCENES, PHOTOGRAPHS, FRACTION = "scenes, uniform", "table, uniform", 0.2
Runs = dict[tuple[str, float, str], dict[int, float]]


def read(path: pathlib.Path) -> Runs:
    """{("data set, protocol", known fraction, method): {seed: test mAP}}."""
    runs: Runs = collections.defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = f"{row['dataset']}, {row['protocol']}"
            key = (name, float(row["known_fraction"] or 0), row["method"])
            runs[key][int(row["seed"])] = float(row["mAP"])
    return runs


def table(runs: Runs, baseline: str) -> str:
    """The Markdown table of what has several seeds."""
    lines = []
    for (name, fraction, method), found in sorted(runs.items()):
        if len(found) < 2:
            continue
        values = list(found.values())
        line = [f"{name}, {fraction:.0%}" if fraction else name, method, str(len(values))]
        line.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        against = runs.get((name, fraction, baseline), {})
        seeds = sorted(found.keys() & against.keys())
        if method == baseline or len(seeds) < 2:
            lines.append([*line, "", "", ""])
            continue
        ours, theirs = [found[s] for s in seeds], [against[s] for s in seeds]
        difference, p_value = study_report.paired_test(ours, theirs)
        each = ", ".join(f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True))
        lines.append([*line, f"{difference:+.2f}", f"{p_value:.2g}", each])
    header = ["data, known", "method", "seeds", "test mAP", f"to {baseline}", "p", "each seed"]
    return rounds.markdown("Runs with several seeds", header, lines)


def ranking(runs: Runs) -> str:
    """Spearman's correlation of the two data sets' mean test mAP over the methods run on both.

    Empty where those are fewer than three.
    """
    both = [
        [runs.get((name, FRACTION, method)) for name in (SCENES, PHOTOGRAPHS)]
        for method in methods.METHODS
    ]
    pairs = [[statistics.mean(v.values()) for v in pair] for pair in both if all(pair)]
    if len(pairs) < 3:
        return ""
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return (
        f"{SCENES} and {PHOTOGRAPHS}, {FRACTION:.0%}: rank correlation of {len(pairs)} methods "
        f"{found.statistic:.2f} (p = {found.pvalue:.2g})"
    )


def draw(runs: Runs, name: str, path: pathlib.Path) -> None:
    """Draws mean and standard deviation over the known fraction, in percent."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    labels = {"known_asl": "known labels alone, ASL", OURS: "the default"}
    for method, label in labels.items():
        found = sorted(
            (f, list(v.values())) for (n, f, m), v in runs.items() if (n, m) == (name, method)
        )
        axes.errorbar(
            [100 * fraction for fraction, _ in found],
            [statistics.mean(values) for _, values in found],
            yerr=[statistics.stdev(values) for _, values in found],
            marker="o",
            capsize=2,
            label=label,
        )
    ceiling = statistics.mean(runs[CEILING].values())
    axes.axhline(ceiling, color="0.6", ls="--", label="all labels known (one seed)")
    axes.set(
        xlabel="known labels (%)", ylabel="test mAP (%)", title="scenes, moderate co-occurrence"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table and perhaps draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("docs/study.csv"))
    parser.add_argument("--baseline", default="known_asl", help="the method compared with")
    parser.add_argument("--picture", type=pathlib.Path)
    options = parser.parse_args()
    runs = read(options.csv)
    print(table(runs, options.baseline))
    print(ranking(runs))
    if options.picture:
        draw(runs, SCENES, options.picture)


if __name__ == "__main__":
    main()
