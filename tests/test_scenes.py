import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from clsl_jax.data import scenes


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(scenes.SPLITS),
    st.integers(0, 10**6),
    st.sampled_from(sorted(scenes.STRENGTHS)),
)
def test_a_scene_shows_two_to_six_visible_labels(seed, split, index, strength):
    parts = scenes.load_parts(split)
    image, labels, visible = scenes.compose_scene(
        parts, seed=seed, split=split, index=index, strength=strength
    )
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert labels.shape == (20,)
    assert labels.dtype == np.int8
    assert set(labels.tolist()) <= {0, 1}
    assert 2 <= labels.sum() <= 6
    assert np.array_equal(visible > 0, labels == 1)
    assert visible[labels == 1].min() >= scenes.MIN_VISIBLE


def _compose(split, count, **options):
    examples = list(scenes.scene_examples(split, count, **options))
    images = np.stack([np.frombuffer(e.content, np.uint8).reshape(64, 64, 3) for e in examples])
    return images, np.stack([e.labels for e in examples])


def test_scenes_are_the_same_on_every_machine():
    """Stored once; another value means that caches and published results no longer fit."""
    digest = hashlib.sha256()
    for split in scenes.SPLITS:
        for strength in scenes.STRENGTHS:
            images, labels = _compose(split, 10, seed=0, strength=strength)
            digest.update(images.tobytes() + labels.tobytes())
    assert digest.hexdigest() == "2c52325aacae741107735604fb29ac44260efac928db24b042c95511dfb6e9b8"


def test_seed_split_strength_and_index_all_matter():
    base = _compose("train", 2, seed=0, strength="moderate")[0]
    assert not np.array_equal(base[0], base[1])
    for other in (
        _compose("train", 2, seed=1, strength="moderate")[0],
        _compose("validation", 2, seed=0, strength="moderate")[0],
        _compose("train", 2, seed=0, strength="strong")[0],
    ):
        assert not np.array_equal(base, other)
    assert np.array_equal(base, _compose("train", 4, seed=0, strength="moderate")[0][:2])


def test_no_part_is_in_two_splits():
    garments, digits = [], []
    for split in scenes.SPLITS:
        parts = scenes.load_parts(split)
        garments.append({part.tobytes() for part in parts.garments.reshape(-1, 28 * 28)})
        digits.append({part.tobytes() for numbers in parts.digits for part in numbers})
    assert [len(g) for g in garments] == [2000, 500, 1000]
    for material in (garments, digits):
        assert not material[0] & material[1]
        assert not material[0] & material[2]
        assert not material[1] & material[2]


def test_labels_are_what_is_drawn():
    """The same scene with one class's parts painted white differs where that class is present."""
    parts = scenes.load_parts("test")
    for index in range(6):
        image, labels, _ = scenes.compose_scene(
            parts, seed=0, split="test", index=index, strength="moderate"
        )
        for label in range(20):
            garments, digits = parts.garments.copy(), list(parts.digits)
            if label < 10:
                garments[label] = 255
            else:
                digits[label - 10] = np.full_like(digits[label - 10], 240)
            changed, _, _ = scenes.compose_scene(
                scenes.Parts(garments, tuple(digits)),
                seed=0,
                split="test",
                index=index,
                strength="moderate",
            )
            assert np.array_equal(changed, image) == (labels[label] == 0)


def test_mutual_information_by_hand():
    # Two equal fair labels share 1 bit; the third is independent of both; the fourth is constant.
    labels = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    information = scenes.pairwise_mutual_information(labels)
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = expected[0, 0] = expected[1, 1] = expected[2, 2] = 1.0
    np.testing.assert_allclose(information, expected, atol=1e-12)
    summary = scenes.mutual_information(labels)
    assert summary["total_mutual_information_bits"] == pytest.approx(1.0)
    assert summary["mean_mutual_information_bits"] == pytest.approx(1 / 6)


def test_mutual_information_of_a_skewed_pair_by_hand():
    # Joint 1/2, 1/4, 1/4, 0; marginals 3/4 and 1/4 each.
    labels = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    by_hand = 0.5 * np.log2(0.5 / 0.5625) + 2 * 0.25 * np.log2(0.25 / 0.1875)
    assert scenes.pairwise_mutual_information(labels)[0, 1] == pytest.approx(by_hand)


def test_mutual_information_equals_scikit_learn():
    labels = (np.random.RandomState(0).random_sample((50, 6)) < [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]) * 1
    information = scenes.pairwise_mutual_information(labels)
    for first in range(6):
        for second in range(6):
            expected = mutual_info_score(labels[:, first], labels[:, second]) / np.log(2)
            assert information[first, second] == pytest.approx(expected, abs=1e-12)


def test_strong_themes_tie_labels_more_than_moderate_ones():
    totals = {}
    for strength in scenes.STRENGTHS:
        labels = _labels(strength, 800)
        shuffled = np.random.RandomState(0)
        alone = np.stack([shuffled.permutation(column) for column in labels.T], axis=1)
        total = scenes.mutual_information(labels)["total_mutual_information_bits"]
        assert total > 5 * scenes.mutual_information(alone)["total_mutual_information_bits"]
        totals[strength] = total
        assert labels.sum(axis=0).min() > 800 * 0.12
    assert totals["strong"] > 3 * totals["moderate"]


def _labels(strength, count):
    labels = np.zeros((count, 20), np.int8)
    for index in range(count):
        draws = scenes.Draws(7, index)
        labels[index, scenes.draw_labels(draws, strength)] = 1
    return labels


def test_what_cannot_be_used_is_named(tmp_path):
    for options, named in (
        ({"strength": "weak"}, "weak"),
        ({"seed": -1}, "-1"),
        ({"sizes": {"train": 0}}, "0"),
        ({"sizes": {"practice": 3}}, "practice"),
    ):
        with pytest.raises(ValueError) as error:
            scenes.prepare_scenes(tmp_path, **options)
        assert named in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="practice"):
        scenes.load_parts("practice")
    assert not list(tmp_path.iterdir())
