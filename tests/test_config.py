"""Configuration: defaults, checks, near names, resuming."""

import importlib.util
import os

import ml_collections
import pytest

from clsl_jax import config as config_lib
from clsl_jax import corrections, losses, metrics
from clsl_jax.data import partial, scenes, sources
from clsl_jax.models import resnet

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs")


def load(name, arg=None):
    spec = importlib.util.spec_from_file_location(name, os.path.join(CONFIGS, f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize(
    ("name", "arg"),
    [("scenes", None), ("scenes", "strong"), ("voc", None), ("voc", "released"), ("coco", None)]
    + [("coco", "released"), ("nuswide", None), ("nuswide", "released"), ("table", None)]
    + [("table", "positives")],
)
def test_every_config_is_valid_and_has_the_keys_scripts_rely_on(name, arg):
    config = load(name, arg)
    config_lib.validate(config)
    flat = config_lib.flatten(config)
    for key in [
        "model.backbone",
        "model.pretrained",
        "data.dir",
        "data.image_size",
        "batch_size",
        "epochs",
        "seed",
        "labels.protocol",
        "labels.known_fraction",
        "recovery.mode",
    ]:
        assert key in flat
    assert flat.keys() == config_lib.flatten(config_lib.base_config()).keys()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.freeze", "backbone", "would keep random weights"),
        ("labels.protocol", "file", "protocol file needs a file"),
        ("labels.file", "mask.npz", "no other protocol has one"),
        ("data.cache", "ram", "auto, none, memory, disk"),
    ],
)
def test_keys_that_do_not_go_together(key, value, expected):
    config = load("scenes")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(config_lib.ConfigError, match=expected):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("data.strength", scenes.STRENGTHS),
        ("data.cache", sources.CACHES),
        ("data.without_labels", sources.WITHOUT_LABELS),
        ("labels.protocol", [*partial.PROTOCOLS, "file"]),
        ("model.backbone", resnet.BACKBONES),
        ("loss.scale", losses.SCALES),
        ("recovery.correction", corrections.CORRECTIONS),
        ("evaluation.convention", metrics.CONVENTIONS),
    ],
)
def test_choices_are_what_the_modules_take(key, names):
    assert sorted(config_lib._CHOICES[key]) == sorted(names)


@pytest.mark.parametrize(
    ("name", "size", "batch", "rate", "ema"),
    [("voc", 448, 64, 9e-5, 0.9983), ("coco", 448, 52, 5e-5, 0.9997)]
    + [("nuswide", 224, 128, 9e-5, 0.9983)],
)
def test_released_recipes(name, size, batch, rate, ema):
    config = load(name, "released")
    assert config.data.image_size == size
    assert config.batch_size == batch
    assert config.optim.learning_rate == rate
    assert config.optim.ema_decay == ema
    assert config.epochs == 60
    assert config.optim.weight_decay == 1e-4
    assert config.optim.warmup_fraction == 0.2
    assert (config.loss.scale, config.recovery.mode) == ("released", "online")
    assert (config.recovery.sharpening, config.recovery.weight) == ("released", 0.8)
    assert (config.loss.gamma_pos, config.loss.gamma_neg) == (0.0, 2.0)
    assert (config.loss.clip, config.loss.eps) == (0.0, 1e-5)
    assert (config.model.rank, config.graph.layers) == (1024, 0)
    assert config.labels.protocol == "released"
    assert config.data.without_labels == ("keep" if name == "voc" else "drop")


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide"])
def test_recipes_of_official_sets_recover_as_the_one_of_photographs(name):
    config, table = load(name).recovery, load("table").recovery
    assert (table.thresholds, table.soft, table.min_known) == ("adaptive", False, 6)
    assert config.warmup_epochs == 30  # of 60
    config.warmup_epochs = table.warmup_epochs
    assert config == table


def test_a_wrong_config_argument_is_named():
    with pytest.raises(config_lib.ConfigError, match=r"voc\.py:relaesed"):
        load("voc", "relaesed")


def test_validate_names_every_key_at_fault():
    config = config_lib.base_config()
    config.labels.known_fraction = 1.5
    config.recovery.mode = "sometimes"
    config.optim.learning_rate = float("nan")
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    text = str(error.value)
    assert "labels.known_fraction=1.5: expected between 0 and 1" in text
    assert "recovery.mode='sometimes': expected one of none, online, epoch" in text
    assert "optim.learning_rate=nan" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "prototypes", "thresholds": "fixed"}, "'prototypes' scores are likenesses"),
        ({"source": "prototypes", "thresholds": "adaptive"}, "recovery.soft=False"),
        ({"thresholds": "none", "soft": False}, "teaches soft labels: set recovery.soft=True"),
        ({"thresholds": "matched"}, "teaches hard labels: set recovery.soft=False"),
        ({"open_weight": 1.0}, "one that was left open: set recovery.confidence_power=0"),
        ({"open_weight": 1.0, "ramp_epochs": 2.0}, "from the first step on, recovery.ramp_epochs"),
        ({"open_weight": 1.0, "mode": "assume"}, "open_weight=1.0 goes with recovery.mode=epoch"),
        ({"thresholds": "none", "min_known": 0}, "by known labels need some; set it to 1 or more"),
        ({"mode": "online", "branch": "global"}, "recovery.branch='global' goes with"),
        ({"source": "statistics", "branch": "mean"}, "recovery.branch='mean' goes with"),
        ({"mode": "blend", "blend_share": 1.0}, "blend_share=1.0: expected between"),
    ],
)
def test_keys_of_recovery_that_contradict_are_refused(changes, message):
    config = config_lib.base_config()
    config.model.global_branch = True
    config.recovery.mode, config.recovery.teacher = "epoch", "ema"
    config_lib.validate(config)
    config.recovery.update(changes)
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [("batchsize", "batch_size"), ("known_fraction", "labels.known_fraction")]
    + [("model.backbon", "model.backbone"), ("recover.mode", "recovery.mode")],
)
def test_near_keys(key, near):
    assert near in config_lib.near_keys(key, config_lib.flatten(config_lib.base_config()))


def test_json_round_trip():
    config = load("scenes")
    again = config_lib.from_json(config_lib.to_json(config), "here")
    assert config_lib.to_json(again) == config_lib.to_json(config)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"no_such_key": 1}'])
def test_damaged_stored_config(text):
    with pytest.raises(config_lib.ConfigError, match=r"there/config\.json"):
        config_lib.from_json(text, "there/config.json")


def test_resume_refuses_what_changes_numbers_and_allows_the_rest():
    old = load("scenes").to_dict()
    new = load("scenes")
    new.data.workers = 3
    new.checkpoint.keep = 5
    # What a refusal for want of memory advises, and a file that was moved.
    new.evaluation.batch_size = 16
    new.cpu_devices = 2
    new.labels.file = "elsewhere/labels.csv"
    config_lib.check_resume(old, new.to_dict(), "there")
    new.seed = 7
    with pytest.raises(config_lib.ConfigError, match="seed: 0 -> 7"):
        config_lib.check_resume(old, ml_collections.ConfigDict(new), "there")
