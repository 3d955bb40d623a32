"""The methods that `clsl_jax.study` compares: each is a few keys over one network and trainer.

All share backbone, data, augmentation, schedule and evaluation; a method sets what the loss does
with unknown labels. Those of other papers are their rule for unknown labels within this network,
not their authors' programs; where a part is left out, `note` says so.

The rules of `losses.py` and `corrections.py` stand there as equations. The others, of image n and
class c, with the label y where it is known, the network's p = sigmoid(logit), a target q of weight
w where it is unknown, BCE(p, t) = -t log p - (1 - t) log(1 - p)::

    known_bce        mean of BCE(p, y) over known cells
                     paper: mean over images of g(share known) / C * sum of BCE(p, y) over known c,
                     g(u) = alpha u^gamma + beta
    negative_bce     q = 0, w = 1
    negative_smooth  e = 0.1: target 1 - e/2 of positives, e/2 of known negatives and unknown cells
    negative_weak    q = 0, w = 1 / (C - 1)
                     paper, of these three: the same, with no label known to be negative
    curriculum       s = p of the row's last visit: q = 1[s >= 0.9], w = 1[s >= 0.9 or s < 0.1]
                     paper, of the logit x: label sign(x), w = 1[x >= theta or x < -theta]
    ema_teacher      weights theta' <- a theta' + (1 - a) theta after each step; q = p of theta' on
                     the image before augmentation, at the row's last visit, w = 1: BCE(p, q)
                     paper: (p - q)^2 of the step itself, with noise on both views
    co_occurrence    s = mean of P(c | j) over the image's known positives j != c, P(c) without any;
                     P(c) = (positives of c + 1) / (known cells of c + 2)
                     P(c | j) = (images of c and j + P(c)) / (images of j where c is known + 1)
                     q = 1[s >= t+], w = 1[s >= t+ or s < t-, not both]: t+ and t- of class c by
                     `recovery.adaptive_thresholds`, at the precisions of the configuration
                     paper: P(c | j) of image n by a layer on its features of c and j, one threshold
    prototypes       s = (1 + cos(f, m)) / 2 of the features f of class c and the prototype m, m <-
                     a m + (1 - a) (mean f of the batch's known positives); s is averaged over
                     visits by the configuration's momentum; q and w from s as in co_occurrence
                     paper: mean of cos(f, m) over several prototypes, thresholds that are learned
    blending         f' = b f + (1 - b) f2 and q = 1 - b with b = 1/2, f2 of a known positive in the
                     image before or, at one c, the prototype; mean BCE over known and blended cells
                     paper: b is learned
    statistics       q = P(c | the image's known labels) = sum_k P(k | these) P(c | k), w = 1;
                     unknown cells count half (`recovery.weight`)

P(c | j) at a known cell, on which thresholds are calibrated, leaves that cell itself out. How the
losses of known and unknown cells add up is the scale's (`losses.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clsl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train from partly known labels.

    Attributes:
      title: as tables show it.
      source: paper and equation or section.
      settings: {configuration key: value}, over whatever configuration the study trains.
      note: how it differs from its paper.
    """

    title: str
    source: str
    settings: Mapping[str, Any]
    note: str = ""


# Label statistics have no part in training or prediction, unknown labels only the method's own.
_ALONE = {
    "evaluation.statistics": False,
    "loss.statistics": False,
    "recovery.source": "scores",
    "recovery.open_weight": 0.0,
}
_NEGATIVE = _ALONE | {"recovery.mode": "assume", "recovery.weight": 1.0, "loss.scale": "mean"}
_BCE = {"loss.name": "bce"}
_ASL = {"loss.name": "asl"}
_KNOWN = _ALONE | {"recovery.mode": "none", "loss.scale": "balanced"}
_EPOCH = _ALONE | {"recovery.mode": "epoch", "loss.scale": "balanced"}
# Hard labels, by thresholds that are calibrated on the known cells of every class, however few:
# that a class needs some of them is in none of these papers.
_TRANSFERRED = {
    "recovery.thresholds": "adaptive",
    "recovery.calibration": "known",
    "recovery.min_known": 1,
    "recovery.soft": False,
    "recovery.weight": 1.0,
}
_SPLC_PAPER = "Zhang et al., arXiv 2112.07368"
_LARGE_LOSS = "Kim et al., Large Loss Matters, arXiv 2206.03740"
_COLE = "Cole et al., Single Positive Labels, arXiv 2106.09708"
_GAMMAS = "gammas and clip of the configuration (negatives 2, positives 0, 0; paper: 4, 0, 0.05)"
_NOTHING_RECOVERED = (
    "where none is right enough on them nothing is recovered, which leaves known labels, BCE"
)
_DELTA = (
    "delta is not tuned; a share of the unknown cells (in the authors' program, of all), rounded "
    "up to a whole cell a batch, which in small batches of few classes is several times as many"
)

METHODS: Mapping[str, Method] = {
    "known_bce": Method(
        "known labels, BCE",
        "Durand et al., arXiv 1902.09720",
        _KNOWN | _BCE,
        note="a mean over known cells; the paper weighs each image by its known share",
    ),
    "known_asl": Method(
        "known labels, ASL", "Ridnik et al., arXiv 2009.14119", _KNOWN | _ASL, note=_GAMMAS
    ),
    "negative_bce": Method("assume negative, BCE", _COLE, _NEGATIVE | _BCE),
    "negative_asl": Method(
        "assume negative, ASL", "arXiv 2009.14119", _NEGATIVE | _ASL, note=_GAMMAS
    ),
    "negative_smooth": Method(
        "assume negative, label smoothing",
        _COLE,
        _NEGATIVE | _BCE | {"loss.smoothing": 0.1, "recovery.assumed": 0.05},
    ),
    "negative_weak": Method(
        "weak assume negative",
        _COLE,
        _NEGATIVE | _BCE | {"recovery.assumed_weight": 0.0},
    ),
    "hill": Method("Hill loss", _SPLC_PAPER, _NEGATIVE | {"loss.name": "hill"}),
    "splc": Method(
        "SPLC",
        _SPLC_PAPER,
        _NEGATIVE
        | {
            "loss.name": "focal_margin",
            "recovery.correction": "self_paced",
            "recovery.correction_threshold": 0.6,
        },
    ),
    "ll_r": Method(
        "LL-R",
        _LARGE_LOSS,
        _NEGATIVE | _BCE | {"recovery.correction": "reject", "recovery.correction_rate": 0.002},
        note=_DELTA,
    ),
    "ll_ct": Method(
        "LL-Ct",
        _LARGE_LOSS,
        _NEGATIVE | _BCE | {"recovery.correction": "correct", "recovery.correction_rate": 0.002},
        note=_DELTA,
    ),
    "ll_cp": Method(
        "LL-Cp",
        _LARGE_LOSS,
        _NEGATIVE
        | _BCE
        | {"recovery.correction": "correct_for_good", "recovery.correction_rate": 0.001},
        note=_DELTA,
    ),
    "epr": Method(
        "expected positives",
        _COLE,
        _KNOWN | _BCE | {"loss.scale": "mean", "loss.expected_positives": 1.0},
        note="the expected number is estimated from the known labels where these tell it",
    ),
    "role": Method(
        "ROLE",
        _COLE,
        _ALONE
        | _BCE
        | {
            "recovery.mode": "estimate",
            "recovery.weight": 1.0,
            "loss.scale": "mean",
            "loss.expected_positives": 1.0,
        },
        note="label estimates move by gradient descent, not by Adam",
    ),
    "curriculum": Method(
        "curriculum labelling",
        "arXiv 1902.09720",
        _EPOCH
        | _BCE
        | {
            "recovery.teacher": "student",
            "recovery.momentum": 0.0,
            "recovery.thresholds": "fixed",
            "recovery.positive_threshold": 0.9,
            "recovery.negative_threshold": 0.1,
            "recovery.soft": False,
            "recovery.weight": 1.0,
        },
        note="score thresholds (from 0.9 on positive, below 0.1 negative), in one training, of "
        "what its steps compute: from augmented images, with dropout and batch statistics",
    ),
    "ema_teacher": Method(
        "EMA teacher, weak and strong view",
        "Tarvainen and Valpola, arXiv 1703.01780",
        _EPOCH
        | _BCE
        | {
            "recovery.teacher": "ema",
            "recovery.view": "clean",
            "recovery.momentum": 0.0,
            "recovery.thresholds": "fixed",
            "recovery.positive_threshold": 0.0,
            "recovery.negative_threshold": 0.0,
            "recovery.soft": True,
            "recovery.confidence_power": 0.0,
            "recovery.weight": 1.0,
        },
        note="BCE, without a ramp, in the place of a squared error whose weight ramps up; targets "
        "are the teacher's probabilities at the row's last visit; the strong view is "
        "the configuration's augmentation (in `scenes` shift, scale and colours): where that "
        "augments nothing, as in `table` with its cached features, both views are the same",
    ),
    "co_occurrence": Method(
        "co-occurrence transfer (SST, within images)",
        "Chen et al., arXiv 2112.10941",
        _EPOCH | _BCE | _TRANSFERRED | {"recovery.source": "co_occurrence"},
        note="frequencies of known labels in the place of a learned co-occurrence; thresholds "
        f"calibrated on known cells, for negatives as well: {_NOTHING_RECOVERED}",
    ),
    "prototypes": Method(
        "prototype transfer (HST, across images)",
        "Chen et al., arXiv 2205.11131",
        _EPOCH | _BCE | _TRANSFERRED | {"recovery.source": "prototypes"},
        note="one moving prototype a class, no contrastive loss; thresholds calibrated on known "
        f"cells, for negatives as well: {_NOTHING_RECOVERED}",
    ),
    "blending": Method(
        "instance and prototype blending (SARB)",
        "Pu et al., arXiv 2203.02172",
        _KNOWN
        | _BCE
        | {"recovery.mode": "blend", "recovery.weight": 1.0, "recovery.warmup_epochs": 5},
        note="the features of SRFL are blended, and what a classifier of each position says beside "
        "SGFE stays the image's own; shares stay at one half, one moving prototype a class, no "
        "contrastive loss",
    ),
    "statistics": Method(
        "label statistics alone",
        "mixture of Bernoulli distributions over known cells",
        _EPOCH
        | {
            "recovery.source": "statistics",
            "recovery.thresholds": "fixed",
            "recovery.positive_threshold": 0.0,
            "recovery.negative_threshold": 0.0,
            "recovery.soft": True,
            "recovery.confidence_power": 0.0,
            "recovery.weight": 0.5,
            "recovery.warmup_epochs": 0,
        },
    ),
    "clsl_released": Method(
        "CLSL, released",
        "arXiv 2510.10055 and its authors' program",
        _ALONE
        | _ASL
        | {
            "recovery.mode": "online",
            "recovery.sharpening": "released",
            "recovery.weight": 0.8,
            "loss.scale": "released",
            "graph.layers": 0,
            "model.global_branch": True,
        },
        note="gradients are clipped where the configuration says so, which the program does not do",
    ),
    "known_informed": Method(
        "known labels, ASL, with label statistics when predicting",
        "this project",
        _KNOWN | _ASL | {"evaluation.statistics": True},
    ),
    "known_product": Method(
        "known labels, ASL, of network and label statistics together",
        "this project",
        _KNOWN | _ASL | {"evaluation.statistics": True, "loss.statistics": True},
    ),
    "clsl": Method("CLSL (clsl_jax)", "this project", {}, note="the configuration as it is"),
    "all_known": Method(
        "all labels known",
        "the ceiling",
        _KNOWN | _ASL | {"labels.protocol": "all", "labels.file": ""},
    ),
}


def find(name: str) -> Method:
    """Returns a method.

    Raises:
      InputError: if there is none of that name, listing all.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}; choose from {', '.join(METHODS)}.")
    return METHODS[name]
