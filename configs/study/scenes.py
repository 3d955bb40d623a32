"""Every method on `scenes`, with moderate and strong co-occurrence.

    python -m clsl_jax.study --config=configs/study/scenes.py --workdir=DIR

Arguments, after a colon: `main` for the default against known labels alone at 10 and 20 %, three
seeds; `methods` for every method at 20 %, moderate, two seeds; `quick` for two methods, two seeds
and little data. On two cores, as two shards with a core each, a cell takes about three minutes:
`main` two thirds of an hour, `methods` one hour, all of it a day and a half.
"""

import ml_collections

from clsl_jax import config as config_lib
from clsl_jax import methods, study


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is None, `main`, `methods` or `quick`."""
    if arg not in (None, "", "main", "methods", "quick"):
        raise config_lib.ConfigError(
            f"configs/study/scenes.py:{arg}: expected nothing, main, methods or quick."
        )
    config = study.base_study()
    config.configs = ("configs/scenes.py", "configs/scenes.py:strong")
    config.methods = tuple(methods.METHODS)
    config.known_fractions = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    config.settings = ("evaluation.pictures=0", "checkpoint.every_epochs=1000")
    if arg == "main":
        config.methods = ("known_asl", "clsl")
        config.known_fractions = (0.1, 0.2)
        config.seeds = (0, 1, 2)
    if arg == "methods":
        config.configs = ("configs/scenes.py",)
        config.known_fractions = (0.2,)
        config.seeds = (0, 1)
    if arg == "quick":
        config.configs = ("configs/scenes.py",)
        config.methods = ("known_asl", "clsl")
        config.known_fractions = (0.2, 0.5)
        config.seeds = (0, 1)
        config.settings += ("data.sizes=(192,64,64)", "epochs=2", "model.widths=(8,)")
    return config
