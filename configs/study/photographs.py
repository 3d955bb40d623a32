"""Every method on photographs, over a frozen pretrained network: the second opinion on `scenes`.

    python -m clsl_jax.study --config=configs/study/photographs.py:DATA --workdir=DIR

DATA is the directory of a prepared `table` set whose cells are all filled, made as
`benchmarks/photographs.py` says with --unknown=0; the study hides 80 % of them from the training
images. `configs/table.py` is the recipe, with its adaptive thresholds (`clsl`), the same by their
expected precision (`expected`), with the surest half of the positives that each class should have
(`matched_half`), with label statistics when predicting (`informed`), and with the soft labels and
the product with label statistics of `configs/scenes.py` (`soft`, `product`, both).
Two seeds of weights, order and mask. `photographs.py:ablation:DATA` has the recipe with one part
changed, and each part alone on a bare network, at 10, 20 and 30 %, five seeds (the tables of
docs/study-details.md, with recovery.min_known=1 added to its settings);
`photographs.py:search:DATA` has its recovery with one choice made otherwise, compared on
validation. In `photographs.py:positives:DATA` one positive of each training image is known and
nothing else; some are told how many an image has (2.4).
"""

import ml_collections

from clsl_jax import ablation, methods, study
from clsl_jax import config as config_lib

_SOFT = "recovery.thresholds=none recovery.soft=True"
_HALF = ablation.OTHERWISE["matched_half"]
_PRODUCT = "loss.statistics=True evaluation.statistics=True recovery.source=both"
# The recipe with one part changed.
CHANGED = {
    **ablation.CHANGED,
    "every_class": "recovery.min_known=1",
    "no_global_branch": "model.global_branch=False",
    "position_residual": "model.position_residual=True",
    "encoder": "model.encoder_layers=1",
    "soft": _SOFT,
}
# A 1x1 classifier pooled over positions, trained on the known labels; then one part.
ALONE = {**ablation.ALONE, "bare+srfl+sgfe": "model.srfl=True model.sgfe=True"}
# The recipe with one choice of its recovery made otherwise.
OTHERWISE = {
    **ablation.OTHERWISE,
    "global_teaches": "recovery.branch=global",
    "both_teach": "recovery.branch=mean",
    "expected": "recovery.calibration=expected",
    "looser": "recovery.positive_precision=0.9 recovery.negative_precision=0.985",
    "stricter": "recovery.positive_precision=0.98 recovery.negative_precision=0.995",
    "soft_beyond_thresholds": "recovery.soft=True",
    "soft": _SOFT,
    "earlier": "recovery.warmup_epochs=8",
    "later": "recovery.warmup_epochs=22",
    # And the choices that go with `matched_half`.
    "quarter": f"{_HALF} recovery.positive_coverage=0.25",
    "three_quarters": f"{_HALF} recovery.positive_coverage=0.75",
    "all_positives": f"{_HALF} recovery.positive_coverage=1.0",
    "half_all_negatives": f"{_HALF} recovery.negative_coverage=1.0",
    "half_early": f"{_HALF} recovery.warmup_epochs=8",
    "half_half_weight": f"{_HALF} recovery.weight=0.5",
    "half_double": f"{_HALF} recovery.weight=2.0",
}

# What `configs/table.py:positives` has otherwise than `configs/table.py`, but for the evaluation.
POSITIVES = (
    "loss.name=bce recovery.thresholds=none recovery.soft=True recovery.calibration=expected "
    "recovery.positive_precision=0.9 recovery.negative_precision=0.985 recovery.min_known=0 "
    "recovery.warmup_epochs=5 recovery.confidence_power=0.0 recovery.open_weight=1.0"
)
_TOLD = "loss.positives_per_image=2.4"
_ASSUMED = ("negative_bce", "negative_asl", "negative_smooth", "negative_weak", "hill", "splc")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is the directory of the data, perhaps after `PART:`."""
    part, _, directory = (arg or "").partition(":")
    if part not in ("ablation", "search", "positives"):
        part, directory = "", arg
    if not directory:
        raise config_lib.ConfigError(
            f"configs/study/photographs.py:{arg or ''}: write the directory of the prepared data "
            "after the colon, or ablation:, search: or positives:DIRECTORY."
        )
    config = study.base_study()
    config.configs = ("configs/table.py",)
    config.methods = tuple(methods.METHODS)
    config.variants = (
        ("expected", "clsl", "recovery.calibration=expected"),
        ("matched_half", "clsl", _HALF),
        ("informed", "clsl", "evaluation.statistics=True"),
        ("product", "clsl", _PRODUCT),
        ("soft", "clsl", _SOFT),
        ("soft_product", "clsl", f"{_SOFT} {_PRODUCT}"),
    )
    if part == "ablation":
        bare = f"{ablation.BARE} model.global_branch=False"
        config.known_fractions = (0.1, 0.2, 0.3)
        ablation.configure(config, CHANGED, ALONE, bare=bare)
    else:
        config.known_fractions = (0.2,)
        config.seeds = (0, 1)
    if part == "search":
        ablation.configure_search(config, OTHERWISE)
    if part == "positives":
        config.protocols = ("single_positive",)
        config.baseline = "negative_asl"
        config.methods = (*_ASSUMED, "ll_r", "ll_cp")
        recover = (
            f"{_TOLD} loss.expected_positives=1.0 loss.name=bce loss.scale=mean "
            "recovery.thresholds=fixed recovery.negative_threshold=0.1"
        )
        config.variants = (
            ("positives", "clsl", POSITIVES),
            ("epr_told", "epr", _TOLD),
            ("role_told", "role", _TOLD),
            ("epr_told+recovery", "clsl", recover),
        )
    config.weights = "last"  # the only ones that are saved: no epoch is picked
    config.settings = (
        f"data.dir={directory}",
        "cpu_devices=1",
        "evaluation.pictures=0",
        "checkpoint.every_epochs=1000",
    )
    return config
