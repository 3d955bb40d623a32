"""A frozen backbone: it stays as it is, and its features are computed once."""

import contextlib
import dataclasses
import os
import pathlib
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_steps
from commands import run, run_several
from exporting import export_torch
from memory_images import MemoryImages

from clsl_jax import features, sharding, steps, train_state
from clsl_jax.data import cache, images, sources
from clsl_jax.errors import InputError
from clsl_jax.models.clsl import backbone_of, head_of
from clsl_jax.step_options import StepOptions

N, C, SIZE = 24, test_steps.C, 16
EMBEDDINGS = np.random.default_rng(9).standard_normal((C, 6)).astype(np.float32)


def make_model(**changes):
    frozen = {"head_dropout": 0.0, "encoder_dropout": 0.0, "freeze_backbone": True}
    return test_steps.make_model(**{**frozen, **changes})


def backbone_variables(model, seed=1):
    """Drawn weights whose batch statistics are not those of a new network."""
    drawn = backbone_of(model).init(
        jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3)), train=False
    )
    rng = np.random.default_rng(seed)
    statistics = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), drawn["batch_stats"]
    )
    return jax.device_get({"params": drawn["params"], "batch_stats": statistics})


def make_images(count=N, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def make_dataset(seed=0):
    def split(name, count):
        labels = (np.random.default_rng(count).random((count, C)) < 0.4).astype(np.int8)
        return sources.Split(
            name=name,
            images=MemoryImages(make_images(count, seed)),
            labels=labels,
            difficult=np.zeros((count, C), bool),
            ids=[f"{name}-{i}" for i in range(count)],
        )

    parts = {"train": split("train", N), "validation": split("validation", 7)}
    return sources.Dataset(
        "toy", tuple("abcde"), f"print {seed}", **parts, test=split("test", 9), facts={}
    )


def start(model, annotations, backbone, mesh):
    # Not Adam, which makes steps of noise where a gradient is zero.
    optimizer = optax.sgd(0.05)

    def init(backbone):
        return train_state.init_state(
            model,
            optimizer,
            seed=3,
            image_size=SIZE,
            label_embeddings=jnp.asarray(EMBEDDINGS),
            annotations=jnp.asarray(sharding.pad_rows(annotations, -1)),
            learn_embeddings=False,
            graph_threshold=0.4,
            graph_smoothing=0.25,
            backbone=backbone,
        )

    return jax.jit(init)(backbone), optimizer


def test_training_leaves_a_frozen_backbone_alone_and_equals_training_on_its_features():
    """Three steps by images and three by features: the same parameters, the same scores."""
    model, mesh = make_model(), sharding.make_mesh(jax.devices()[:1])
    backbone = backbone_variables(model)
    annotations = make_dataset().train.labels
    options = StepOptions(steps_per_epoch=3, teacher="student")
    by_image, optimizer = start(model, annotations, backbone, mesh)
    by_feature, _ = start(model, annotations, backbone, mesh)
    assert "backbone" not in by_image.params["model"]
    assert "backbone" not in by_image.batch_stats
    pixels = make_images()
    found = backbone_of(model).apply(backbone, steps.normalize(jnp.asarray(pixels)), train=False)
    step = jax.jit(steps.make_train_step(model, optimizer, options))
    head_step = jax.jit(steps.make_train_step(head_of(model), optimizer, options))
    for k in range(3):
        rows = np.arange(8 * k, 8 * k + 8, dtype=np.int32)
        by_image = step(by_image, {"image": pixels[rows], "row": rows})
        by_feature = head_step(by_feature, {"image": np.asarray(found)[rows], "row": rows})
    by_image, by_feature = jax.device_get((by_image, by_feature))
    jax.tree.map(np.testing.assert_array_equal, by_image.frozen, backbone)
    for a, b in (
        (by_image.params, by_feature.params),
        (by_image.batch_stats, by_feature.batch_stats),
        (by_image.scores, by_feature.scores),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


def test_the_head_starts_alike_with_and_without_given_backbone():
    model = make_model(freeze_backbone=False)
    annotations = make_dataset().train.labels
    drawn, _ = start(model, annotations, None, None)
    given, _ = start(model, annotations, backbone_variables(model), None)
    drawn, given = drawn.params["model"], dict(given.params["model"])
    expected = backbone_variables(model)["params"]
    jax.tree.map(np.testing.assert_array_equal, dict(given.pop("backbone")), expected)
    head = {name: tree for name, tree in drawn.items() if name != "backbone"}
    jax.tree.map(np.testing.assert_array_equal, head, given)


@pytest.fixture
def compute(tmp_path):
    model, mesh = make_model(), sharding.make_mesh(jax.devices()[:2])

    def go(dataset, seed=1, **how):
        lines = []
        made = features.cached_features(
            dataset,
            model,
            sharding.put_replicated(mesh, backbone_variables(model, seed)),
            mesh=mesh,
            image_size=SIZE,
            batch_size=4,
            directory=tmp_path / "features",
            report=lines.append,
            **how,
        )
        return made, lines

    return go


def test_a_stop_leaves_nothing_and_what_a_kill_left_is_swept(compute, tmp_path):
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(make_dataset(), poll=poll)
    assert list((tmp_path / "features").iterdir()) == []
    (tmp_path / "features" / "toy-train-0.npy.partial-1-aa").write_bytes(b"long ago")
    (tmp_path / "features" / "toy-train-0.npy.partial-2-bb").write_bytes(b"just now")
    os.utime(tmp_path / "features" / "toy-train-0.npy.partial-1-aa", (0, 0))
    assert len(compute(make_dataset())[1]) == 3
    names = [path.name for path in (tmp_path / "features").iterdir()]
    assert [name for name in names if "partial" in name] == ["toy-train-0.npy.partial-2-bb"]


def test_features_are_computed_once(compute, tmp_path):
    dataset = make_dataset()
    made, lines = compute(dataset)
    assert len(lines) == 3
    model = make_model()
    for name in sources.SPLITS:
        before, after = getattr(dataset, name), getattr(made, name)
        pixels = np.stack([before.images[i]["image"] for i in range(len(before.ids))])
        expected = backbone_of(model).apply(
            backbone_variables(model), steps.normalize(jnp.asarray(pixels)), train=False
        )
        for i in range(len(before.ids)):
            record = after.images[i]
            assert record["row"] == i
            assert record["image"].dtype == np.float16
            np.testing.assert_allclose(record["image"], expected[i], rtol=1e-3, atol=1e-3)
    again, lines = compute(dataset)
    assert lines == []
    np.testing.assert_array_equal(again.test.images[3]["image"], made.test.images[3]["image"])
    # Other weights or other images are other files; nothing unfinished is left.
    assert len(compute(dataset, seed=2)[1]) == 3
    assert len(compute(make_dataset(seed=1))[1]) == 3
    assert len(list((tmp_path / "features").iterdir())) == 9


def test_a_split_that_is_not_read_keeps_its_images(compute):
    dataset = make_dataset()
    made, lines = compute(dataset, splits=("train", "test"))
    assert [line.partition(":")[0] for line in lines] == ["train", "test"]
    assert made.validation is dataset.validation


class Damaged(MemoryImages):
    def __getitem__(self, index):
        if index in (3, 4):
            raise images.CorruptImage(f"image {index} is damaged")
        return super().__getitem__(index)


def test_an_unreadable_training_image_is_replaced_and_another_one_an_error(compute):
    dataset = make_dataset()
    train = dataclasses.replace(dataset.train, images=images.Tolerant(Damaged(make_images())))
    made, _ = compute(dataclasses.replace(dataset, train=train))
    for asked, shown in ((2, 2), (3, 5), (4, 5), (5, 5)):
        record = made.train.images[asked]
        assert (record["asked"], record["row"]) == (asked, shown)
        np.testing.assert_array_equal(record["image"], made.train.images[shown]["image"])
    broken = dataclasses.replace(dataset.test, images=Damaged(make_images(9)))
    with pytest.raises(InputError, match="image 3 is damaged"):
        compute(dataclasses.replace(make_dataset(seed=5), test=broken))


def test_a_damaged_file_is_named(compute, tmp_path):
    compute(make_dataset())
    (path,) = (tmp_path / "features").glob("toy-test-*.npy")
    path.write_bytes(path.read_bytes()[:-50])
    made, _ = compute(make_dataset())
    with pytest.raises(InputError, match=r"toy-test-.*delete the file"):
        made.test.images[0]


@pytest.mark.parametrize("finishes", [True, False])
def test_another_run_that_computes_them_is_waited_for(compute, tmp_path, finishes):
    compute(make_dataset(), splits=("test",))
    (path,) = (tmp_path / "features").iterdir()
    whole = path.read_bytes()
    path.unlink()
    other = contextlib.ExitStack()
    assert other.enter_context(cache.writer(path, wait=True))
    with pytest.raises(KeyboardInterrupt):
        compute(make_dataset(), splits=("test",), poll=_raise_interrupt)
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 2:
            if finishes:
                path.write_bytes(whole)
            other.close()

    _, lines = compute(make_dataset(), splits=("test",), poll=poll)
    assert [line.partition(":")[2].split()[0] for line in lines] == ["computing", "another"]
    batches = 3  # of four images
    assert len(calls) == (2 if finishes else 2 + batches)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def _raise_interrupt():
    raise KeyboardInterrupt


SEVERAL = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from clsl_jax import cluster
cluster.join()
import test_features
test_features.together(sys.argv[1].removeprefix("--workdir="), sys.argv[2])
cluster.leave(0)
"""


def together(workdir, what):
    """Does what one of several processes does in the tests below."""
    place, partials = pathlib.Path(workdir) / "features", []
    model, mesh = make_model(backbone_widths=(4, 32)), sharding.make_mesh()

    def compute():
        partials.clear()
        return features.cached_features(
            make_dataset(),
            model,
            sharding.put_replicated(mesh, backbone_variables(model)),
            mesh=mesh,
            image_size=SIZE,
            batch_size=2 * jax.process_count(),
            directory=place,
            splits=("train",),
            poll=lambda: partials.append(len(list(place.glob("*.partial-*")))),
        )

    def tried():
        try:
            compute()
        except InputError as error:
            return str(error)

    if what == "compute":
        made, most = compute(), max(partials)
        expected = backbone_of(model).apply(
            backbone_variables(model), steps.normalize(jnp.asarray(make_images())), train=False
        )
        for row in range(N):
            found = made.train.images[row]["image"]
            np.testing.assert_allclose(found, expected[row], rtol=1e-3, atol=1e-3)
        compute()
        print(f"files at once: {most}, batches of the second time: {len(partials)}", flush=True)
        return
    # Of two processes with a directory each the second cannot write, at one moment after another.
    second = jax.process_index() == 1
    if second:
        place.parent.mkdir(exist_ok=True)
        place.write_text("")
    print("begin:", tried(), flush=True)
    if second:
        place.unlink()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    error = tried()
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print("first batch:", error, len(partials), flush=True)
    compute()
    (path,) = place.iterdir()
    if second:
        path.unlink()
        path.mkdir()
    print("end:", tried(), flush=True)
    print("left:", [x.name for x in place.iterdir()] == [path.name], flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_of_several_processes_one_writes_to_a_directory(shared, tmp_path, apart):
    statuses, said = run_several(
        shared, tmp_path / "run", "compute", processes=2, devices=1, program=SEVERAL, apart=apart
    )
    assert statuses == [0, 0], said
    most = [re.findall(r"at once: (\d), batches of the second time: 0", text) for text in said]
    assert most == [["1"]] * 2
    files = [path for path in tmp_path.rglob("features/*") if path.is_file()]
    assert [path.parent.parent.name for path in sorted(files)] == (
        ["run-0", "run-1"] if apart else ["run"]
    )


@pytest.mark.slow
def test_where_one_of_two_processes_cannot_write_both_fail(shared, tmp_path):
    statuses, said = run_several(
        shared, tmp_path / "run", "fail", processes=2, devices=1, program=SEVERAL, apart=True
    )
    assert statuses == [0, 0], said
    other, own = "Process 1 cannot go on", r".*\.npy: features cannot be written here \({}\); make"
    for moment, reason in (
        ("begin", "File exists"),
        ("first batch", "File too large"),
        ("end", "Is a directory"),
    ):
        assert re.search(f"^{moment}: {other}", said[0], re.MULTILINE), said
        assert re.search(f"^{moment}: {own.format(reason)}", said[1], re.MULTILINE), said
    assert [text.count("left: True") for text in said] == [1, 1]
    assert [re.findall(r"^first batch: .* (\d+)$", text, re.MULTILINE) for text in said] == [
        ["1"],
        ["1"],
    ]


FROZEN = (
    "--config.model.freeze=backbone",
    "--config.data.translate=0.0",
    "--config.data.scale=0.0",
    "--config.data.color_jitter=0.0",
)


@pytest.mark.slow
def test_a_run_on_cached_features_resumes_and_evaluates_to_the_same_numbers(tmp_path):
    """By the command line: the weights file may be gone once the run has started."""
    shared = str(tmp_path)
    model = make_model(backbone_widths=(8, 16))
    weights = str(tmp_path / "backbone.npz")
    np.savez(weights, **export_torch(backbone_variables(model)))
    arguments = (*FROZEN, f"--config.model.pretrained={weights}")
    status, out, err = run(shared, tmp_path / "run", *arguments)
    assert status == 0, err
    assert out.count("computing the features") == 3
    first = (tmp_path / "run" / "results.json").read_text()
    predictions = np.load(tmp_path / "run" / "predictions.npz")["scores"]
    os.remove(weights)
    status, out, err = run(shared, tmp_path / "run", *arguments)
    assert status == 0, err
    assert "computing" not in out
    assert (tmp_path / "run" / "results.json").read_text() == first
    (training,) = tmp_path.glob("data/features/*-train-*.npy")
    training.unlink()  # an evaluation does not read them
    status, out, err = run(shared, tmp_path / "run", "--mode=evaluate", tiny=False)
    assert status == 0, err
    assert "computing" not in out
    np.testing.assert_array_equal(
        np.load(tmp_path / "run" / "predictions.npz")["scores"], predictions
    )
