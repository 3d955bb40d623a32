"""The parts of the method, each as the keys that take it out of a recipe or put it in alone.

And the choices that recovery rests on, each as the keys that make it otherwise. Studies of an
ablation or a search (`configs/study/`) add to these what only their recipe has.
"""

from collections.abc import Mapping

import ml_collections

NO_STATISTICS = "loss.statistics=False evaluation.statistics=False recovery.source=scores"


def hard(thresholds: str) -> str:
    """Returns the keys of hard labels, beyond thresholds of that kind (`recovery.thresholds`)."""
    return f"recovery.soft=False recovery.thresholds={thresholds}"


def online(sharpening: str) -> str:
    """Returns the keys of recovery within each step, by that way of `recovery.sharpening`."""
    return (
        "recovery.mode=online recovery.source=scores recovery.weight=0.8 "
        f"recovery.sharpening={sharpening}"
    )


_MATCHED = hard("matched")

# A recipe with one part changed: what it is worth beside all others.
CHANGED: Mapping[str, str] = {
    "no_srfl": "model.srfl=False",
    "no_sgfe": "model.sgfe=False",
    "no_srfl_no_sgfe": "model.srfl=False model.sgfe=False",
    "gcn": "graph.layers=2 graph.refresh=False",
    "gcn_refreshed": "graph.layers=2",
    "no_recovery": "recovery.mode=none",
    "fixed": hard("fixed"),
    "online": online("safe"),
    "online_released": online("released"),
    "no_ema": "optim.ema_decay=0.0",
    "mean_scale": "loss.scale=mean",
}
# The recipe's loss on known labels, its backbone and encoder, a 1x1 classifier of each position.
BARE = (
    f"{NO_STATISTICS} recovery.mode=none loss.scale=mean optim.ema_decay=0.0 "
    "model.srfl=False model.sgfe=False model.position_residual=False"
)
# One part on that.
ALONE: Mapping[str, str] = {
    "bare": "",
    "bare+srfl": "model.srfl=True",
    "bare+srfl+gcn": "model.srfl=True graph.layers=2",
    "bare+sgfe": "model.sgfe=True",
    "bare+global_branch": "model.global_branch=True",
    "bare+recovery": "recovery.mode=epoch",
    "bare+online": online("safe"),
    "bare+online_released": online("released"),
    "bare+ema": "optim.ema_decay=0.99",
    "bare+balanced_scale": "loss.scale=balanced",
}
# Another choice for one of those that recovery rests on: who teaches, over how many epochs scores
# are averaged, how they become labels, how much those weigh.
OTHERWISE: Mapping[str, str] = {
    "student_teaches": "recovery.teacher=student",
    "last_scores": "recovery.momentum=0.0",
    "longer_average": "recovery.momentum=0.8",
    "matched": f"{_MATCHED} recovery.positive_coverage=1.0 recovery.negative_coverage=1.0",
    "matched_half": f"{_MATCHED} recovery.positive_coverage=0.5 recovery.negative_coverage=0.0",
    "half_weight": "recovery.weight=0.5",
    "double_weight": "recovery.weight=2.0",
    "ramp": "recovery.ramp_epochs=8.0",
}


def configure_search(study: ml_collections.ConfigDict, otherwise: Mapping[str, str]) -> None:
    """Makes a study the search for its recipe's recovery, compared on validation.

    Args:
      study: is changed.
      otherwise: {name: "key=value key=value"}, each on the recipe.
    """
    configure(study, otherwise, {})
    study.split = "validation"


def configure(
    study: ml_collections.ConfigDict,
    changed: Mapping[str, str],
    alone: Mapping[str, str],
    *,
    bare: str = BARE,
) -> None:
    """Makes a study the ablation of its recipe: the baseline, and the rows as its variants.

    Args:
      study: is changed.
      changed: {name: "key=value key=value"}, each on the recipe.
      alone: the same, each on the bare network.
      bare: the keys of the bare network.
    """
    study.methods = ("clsl",)
    study.baseline = "clsl"
    study.variants = (
        *((name, "clsl", keys) for name, keys in changed.items()),
        *((name, "clsl", f"{bare} {keys}") for name, keys in alone.items()),
    )
