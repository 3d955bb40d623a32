"""Masks that tell how much is new in the cells that a run recovered: with their true labels.

    PYTHONPATH=. python benchmarks/sure_cells.py WORKDIR --out=DIR
    python -m clsl_jax.main --config=configs/scenes.py --workdir=RUN --config.recovery.mode=none \\
        --config.labels.protocol=file --config.labels.file=DIR/sure.npy

WORKDIR is a finished run of `clsl_jax.main` whose training labels are all at hand. `sure.npy` knows
what the run knew and each cell that it handed a label out for, `right.npy` those of them of which
it had the label right, and `random.npy` as many others as `sure.npy`, as many of them positive,
drawn at random from all that were hidden. Trained on, they say what recovery could bring if its
mistakes were put right, if it made none, and what as many labels are worth.
"""

import argparse
import pathlib

import jax
import numpy as np
from finished_run import last_state
from rounds import markdown

from clsl_jax.workdir import Workdir


def masks(
    known: np.ndarray, taken: np.ndarray, right: np.ndarray, labels: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """{"sure", "right", "random"}: bool [N, C] each, which cells are known.

    Args:
      known: bool [N, C], of the run.
      taken: bool [N, C], the cells that it handed out; none is known.
      right: bool [N, C], where the label handed out is the true one.
      labels: int8 [N, C], all of them.
      seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    drawn = known.copy()
    for label in (0, 1):
        hidden = np.flatnonzero(~known & (labels == label))
        count = int((taken & (labels == label)).sum())
        drawn.flat[generator.choice(hidden, count, replace=False)] = True
    return {"sure": known | taken, "right": known | (taken & right), "random": drawn}


def main(workdir: str, out: pathlib.Path) -> None:
    """Writes the masks of a run and prints what they hold."""
    built, state = last_state(workdir)
    labels, count = built.dataset.train.labels, len(built.annotations)
    known = built.annotations >= 0
    recovered, weight = jax.device_get((state.recovered[:count], state.recovered_weight[:count]))
    taken = ~known & (weight > 0)
    right = (recovered > 0.5) == (labels == 1)
    out.mkdir(parents=True, exist_ok=True)
    rows = [["known to the run", f"{known.sum():,}", f"{(labels[known] == 1).sum():,}", ""]]
    seed = Workdir.stored_config(workdir).seed
    for name, mask in masks(known, taken, right, labels, seed=seed).items():
        np.save(out / f"{name}.npy", mask)
        added = mask & ~known
        share = f"{100 * right[added].mean():.1f} %" if name != "random" else ""
        rows.append(
            [f"{name}: added", f"{added.sum():,}", f"{(labels[added] == 1).sum():,}", share]
        )
    print(markdown(workdir, ["cells", "in all", "positive", "of which the run had right"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    main(arguments.workdir, arguments.out)
