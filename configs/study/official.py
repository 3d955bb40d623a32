"""Methods on VOC 2007, MS-COCO or NUS-WIDE, with published numbers beside them.

    python -m clsl_jax.study --config=configs/study/official.py:voc:DATA --workdir=DIR

or `coco:DATA`, `nuswide:DATA`; DATA is the directory of the prepared set. Recipe and schedule are
those of `configs/voc.py` (`coco.py`, `nuswide.py`), but known labels are drawn by the protocol
`uniform` and not the authors' `released`, with random weights and label embeddings unless files are
named, together with the directory, for every run:

    --config.settings="('data.dir=DATA','model.pretrained=resnet101.pth','model.embeddings=labels.npz')"

Four methods, 10 to 90 % of the labels known, three seeds: 108 runs, each as long as one of
`configs/voc.py`; `--config.methods`, `known_fractions` and `seeds` ask for others, `--shard=0/9`
spreads them over as many jobs. Test mAP, interpolated, of the saved epoch that is best on
validation, for which a tenth of the training images is held out with all of its labels. A run keeps
two or three checkpoints, on COCO some GiB.

Published numbers, all at 10 %, stand beside the paper that they are of. There, too, chance says
which labels are known; but backbone (that of CLSL is not stated, those of DualCoOp, TaI and SCPNet
are CLIP's), training images, image size, average precision and choice of the epoch are their
authors' own.
"""

import ml_collections

from clsl_jax import config as config_lib
from clsl_jax import study

_CLSL = "arXiv 2510.10055, by its page on a results site"
_DURAND = "arXiv 1902.09720, in later papers"
# Name, percent at 10 % known, source.
_PUBLISHED = {
    "voc": (
        ("CLSL", 91.7, _CLSL),
        ("Partial BCE", 80.7, _DURAND),
        ("DualCoOp", 90.3, "arXiv 2206.09541"),
        ("DualCoOp + TaI", 93.3, "arXiv 2211.12739"),
    ),
    "coco": (("CLSL", 82.6, _CLSL), ("SCPNet", 80.3, "Ding et al., CVPR 2023")),
    "nuswide": (("CLSL", 61.7, _CLSL),),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the study; `arg` is the set and the directory of its prepared data."""
    name, _, directory = (arg or "").partition(":")
    if name not in _PUBLISHED or not directory:
        raise config_lib.ConfigError(
            f"configs/study/official.py:{arg or ''}: write one of {', '.join(_PUBLISHED)} and the "
            "directory of the prepared data after colons, such as voc:DATA."
        )
    config = study.base_study()
    config.configs = (f"configs/{name}.py",)
    config.methods = ("known_bce", "known_asl", "clsl_released", "clsl")
    config.known_fractions = tuple(tenth / 10 for tenth in range(1, 10))
    config.seeds = (0, 1, 2)
    config.settings = (f"data.dir={directory}", "evaluation.pictures=0")
    config.published = tuple(
        (title, name, "uniform", 0.1, percent, source)
        for title, percent, source in _PUBLISHED[name]
    )
    return config
