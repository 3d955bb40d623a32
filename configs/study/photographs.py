"""Every method on photographs, over a frozen pretrained network: the second opinion on `scenes`.

    python -m clsl_jax.study --config=configs/study/photographs.py:DATA --workdir=DIR

DATA is the directory of a prepared `table` set whose cells are all filled, made as
`benchmarks/photographs.py` says with --unknown=0; the study hides 80 % of them from the training
images. `configs/table.py` is the recipe, with its adaptive thresholds (`clsl`), the same by their
expected precision (`expected`), and with the soft labels and the product with label statistics of
`configs/scenes.py` (`soft`, `product`, both).
Two seeds of weights, order and mask.
"""

import ml_collections

from clsl_jax import config as config_lib
from clsl_jax import methods, study

_SOFT = "recovery.thresholds=none recovery.soft=True"
_PRODUCT = "loss.statistics=True evaluation.statistics=True recovery.source=both"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is the directory of the data."""
    if not arg:
        raise config_lib.ConfigError(
            "configs/study/photographs.py: write the directory of the prepared data after a colon."
        )
    config = study.base_study()
    config.configs = ("configs/table.py",)
    config.methods = tuple(methods.METHODS)
    config.variants = (
        ("expected", "clsl", "recovery.calibration=expected"),
        ("informed", "clsl", "evaluation.statistics=True"),
        ("product", "clsl", _PRODUCT),
        ("soft", "clsl", _SOFT),
        ("soft_product", "clsl", f"{_SOFT} {_PRODUCT}"),
    )
    config.known_fractions = (0.2,)
    config.seeds = (0, 1)
    config.settings = (
        f"data.dir={arg}",
        "cpu_devices=1",
        "evaluation.pictures=0",
        "checkpoint.every_epochs=1000",
    )
    return config
