"""Every method on `scenes`, with moderate and strong co-occurrence.

    python -m clsl_jax.study --config=configs/study/scenes.py --workdir=DIR

Arguments, after a colon: `main` for the default against known labels alone at 10, 20 and 30 %,
five seeds; `methods` for every method at 20 %, moderate, two seeds; `fractions` for the default
against known labels alone at the other fractions, moderate, five seeds; `ablation` for one key
changed, and each part alone on a bare network, at 10, 20 and 30 %, moderate, five seeds; `search`
for the default's recovery with one choice made otherwise, at 20 %, moderate, two seeds, on
validation; `quick` for two methods, two seeds and little data. All but `quick` share their cells in
one DIR. On two cores, as two shards with a core each, a cell takes two and a half to three minutes:
`main` an hour and a half, `methods` and `fractions` an hour each, `search` 40 minutes, `ablation`
twelve hours (with --config.known_fractions="(0.2,)" --config.seeds="(0,1)" an hour and a half), all
of it two days.
"""

import ml_collections

from clsl_jax import ablation, methods, study
from clsl_jax import config as config_lib

_ARGUMENTS = ("main", "methods", "fractions", "ablation", "search", "quick")
# The default with one part changed: what each is worth beside all others.
CHANGED = {
    **ablation.CHANGED,
    "no_position_residual": "model.position_residual=False",
    "no_encoder": "model.encoder_layers=0",
    "global_branch": "model.global_branch=True",
    "no_statistics": ablation.NO_STATISTICS,
    "statistics_when_predicting": "loss.statistics=False recovery.source=scores",
    "own_scores": "recovery.source=scores",
    "adaptive": ablation.hard("adaptive"),
    "adaptive_known": f"{ablation.hard('adaptive')} recovery.calibration=known",
}
# Known labels, ASL, backbone, encoder and a 1x1 classifier pooled over positions; then one part.
ALONE = {
    **ablation.ALONE,
    "bare+sgfe+residual": "model.sgfe=True model.position_residual=True",
    "bare+adaptive": f"recovery.mode=epoch {ablation.hard('adaptive')}",
    "bare+statistics_when_predicting": "evaluation.statistics=True",
    "bare+statistics": "evaluation.statistics=True loss.statistics=True",
}
# The default with one choice of its recovery made otherwise.
OTHERWISE = {
    **ablation.OTHERWISE,
    "augmented_view": "recovery.view=augmented",
    "adaptive": CHANGED["adaptive"],
    "every_cell_alike": "recovery.confidence_power=0.0",
    "sure_cells": "recovery.confidence_power=4.0",
    "later": "recovery.warmup_epochs=8",
    # What an EMA teacher has otherwise, beside label statistics.
    "alike_last": "recovery.momentum=0.0 recovery.confidence_power=0.0 recovery.warmup_epochs=1",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is None or one of `main`, `methods`, `fractions`, ..."""
    if arg and arg not in _ARGUMENTS:
        raise config_lib.ConfigError(
            f"configs/study/scenes.py:{arg}: expected nothing or one of {', '.join(_ARGUMENTS)}."
        )
    config = study.base_study()
    config.configs = ("configs/scenes.py", "configs/scenes.py:strong")
    config.methods = tuple(methods.METHODS)
    config.known_fractions = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    config.weights = "last"  # the only ones that are saved: no epoch is picked
    config.settings = ("evaluation.pictures=0", "checkpoint.every_epochs=1000")
    if arg in ("main", "fractions"):
        config.methods = ("known_asl", "clsl")
        config.known_fractions = (0.1, 0.2, 0.3) if arg == "main" else (0.05, 0.5, 0.7, 0.9)
    if arg in ("methods", "search"):
        config.known_fractions = (0.2,)
        config.seeds = (0, 1)
    if arg in ("methods", "fractions", "ablation", "search"):
        config.configs = ("configs/scenes.py",)
    if arg == "ablation":
        config.known_fractions = (0.1, 0.2, 0.3)
        ablation.configure(config, CHANGED, ALONE)
    if arg == "search":
        ablation.configure_search(config, OTHERWISE)
    if arg == "quick":
        config.configs = ("configs/scenes.py",)
        config.methods = ("known_asl", "clsl")
        config.known_fractions = (0.2, 0.5)
        config.seeds = (0, 1)
        config.settings += ("data.sizes=(192,64,64)", "epochs=2", "model.widths=(8,)")
    return config
