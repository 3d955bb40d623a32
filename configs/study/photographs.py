"""Known labels alone against recovery on photographs, over a frozen pretrained network.

    python -m clsl_jax.study --config=configs/study/photographs.py:DATA --workdir=DIR

DATA is the directory of a prepared `table` set, made as `benchmarks/photographs.py` says; 70 % of
its cells are empty, and nothing else is hidden. Three seeds of weights and order.
"""

import ml_collections

from clsl_jax import config as config_lib
from clsl_jax import study

_SOFT = "recovery.thresholds=none recovery.confidence_power=1.0"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is the directory of the data."""
    if not arg:
        raise config_lib.ConfigError(
            "configs/study/photographs.py: write the directory of the prepared data after a colon."
        )
    config = study.base_study()
    config.configs = ("configs/table.py",)
    config.methods = ("known_asl", "known_informed", "clsl")
    config.variants = (
        ("soft", "clsl", _SOFT),
        ("soft_informed", "clsl", f"{_SOFT} evaluation.statistics=True"),
    )
    config.protocols = ("all",)
    config.known_fractions = (0.3,)  # of the table itself
    config.seeds = (0, 1, 2)
    config.settings = (
        f"data.dir={arg}",
        "cpu_devices=1",
        "evaluation.pictures=0",
        "checkpoint.every_epochs=1000",
    )
    return config
