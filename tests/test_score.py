"""One prediction file under every convention: against hand arithmetic, scikit-learn and the CLI."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from clsl_jax import metrics, score
from clsl_jax.errors import InputError

# Class a, from the best score down: 0.9 positive, 0.8 difficult, 0.7 negative, 0.6 positive,
# 0.2 negative; the fourth image has no positive. Class b has its one positive at the top.
SCORES = np.array([[0.9, 0.8], [0.8, 0.1], [0.6, 0.3], [0.7, 0.2], [0.2, 0.9]])
LABELS = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [0, 1]], np.int8)
IGNORE = np.array([[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]], bool)
NAMES = ["a", "b"]


def _save(path: pathlib.Path, **changes: object) -> str:
    arrays = {
        "scores": SCORES.astype(np.float32),
        "labels": LABELS,
        "ignore": IGNORE,
        "ids": np.array([f"image-{i}" for i in range(len(SCORES))]),
        "class_names": np.array(NAMES),
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clsl_jax.score", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("convention", "difficult", "without_labels", "expected", "images"),
    [
        # Precisions at the two positives of class a; class b has AP 1 throughout.
        ("interpolated", "ignored", "kept", (1 + 2 / 3) / 2, 5),
        ("interpolated", "negative", "kept", (1 + 2 / 4) / 2, 5),
        # Images 1 and 3 go: the one is difficult only, the other has nothing.
        ("interpolated", "ignored", "dropped", 1, 3),
        ("uninterpolated", "negative", "dropped", 1, 3),
    ],
)
def test_average_precision_by_hand(
    convention: str, difficult: str, without_labels: str, expected: float, images: int
) -> None:
    found = score.score_convention(
        SCORES,
        LABELS,
        IGNORE,
        NAMES,
        convention=convention,
        difficult=difficult,
        without_labels=without_labels,
    )
    assert found["AP"] == pytest.approx({"a": expected, "b": 1})
    assert found["mAP"] == pytest.approx((expected + 1) / 2)
    assert found["images"] == images


def test_the_top_classes_exceed_the_threshold_given() -> None:
    """Above 0.65 one class an image: a of the first and fourth, b of the fifth; two are right."""
    found = score.score_convention(
        SCORES, LABELS, IGNORE, NAMES, convention="interpolated", threshold=0.65, top_k=1
    )
    assert found["top_1"]["OP"] == pytest.approx(2 / 3)
    assert found["threshold_0.65"]["OP"] == pytest.approx(2 / 4)


def test_conventions_of_ap_differ() -> None:
    # Negative above the first of two positives: precisions 1/2, 2/3; the envelope makes both 2/3.
    scores = np.array([[0.9], [0.8], [0.7]])
    labels = np.array([[0], [1], [1]], np.int8)
    nothing = np.zeros_like(labels, bool)
    found = {
        convention: score.score_convention(scores, labels, nothing, ["a"], convention=convention)[
            "mAP"
        ]
        for convention in metrics.CONVENTIONS
    }
    assert found == pytest.approx({"interpolated": 2 / 3, "uninterpolated": (1 / 2 + 2 / 3) / 2})


def test_threshold_and_top_k_by_hand() -> None:
    found = score.score_convention(
        SCORES, LABELS, IGNORE, NAMES, convention="interpolated", threshold=0.5, top_k=1
    )
    # Above 0.5: a in images 0, 2, 3 (1 is ignored), 2 of 3 right; b in images 0, 4, 1 of 2 right.
    assert found["threshold_0.5"] == pytest.approx(
        {
            "CP": (2 / 3 + 1 / 2) / 2,
            "CR": 1,
            "CF1": 2 * (7 / 12) / (7 / 12 + 1),
            "OP": 3 / 5,
            "OR": 1,
            "OF1": 2 * 0.6 / 1.6,
        }
    )
    # The best class of image 0 is a, so that b is predicted in image 4 alone.
    assert found["top_1"]["CP"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["top_1"]["OP"] == pytest.approx(3 / 4)
    dropped = score.score_convention(
        SCORES, LABELS, IGNORE, NAMES, convention="interpolated", without_labels="dropped"
    )
    assert dropped["threshold_0.5"]["OP"] == pytest.approx(3 / 4)


def test_unknown_labels_never_count() -> None:
    labels = LABELS.copy()
    labels[3, 0] = labels[4, 0] = -1
    for difficult in score.DIFFICULT_AS:
        by_label = score.score_convention(
            SCORES, labels, IGNORE, NAMES, convention="interpolated", difficult=difficult
        )
        assert by_label["AP"]["a"] == pytest.approx(1 if difficult == "ignored" else 5 / 6)
        assert by_label["ignored_entries"] == (3 if difficult == "ignored" else 2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), difficult=st.sampled_from(score.DIFFICULT_AS))
def test_equals_scikit_learn(seed: int, difficult: str) -> None:
    rng = np.random.default_rng(seed)
    n, c = 40, 5
    scores = rng.integers(0, 21, (n, c)) / 20
    labels = (rng.random((n, c)) < 0.3).astype(np.int8)
    ignore = (rng.random((n, c)) < 0.15) & (labels == 0)
    names = [str(i) for i in range(c)]
    for without_labels in score.WITHOUT_LABELS:
        found = score.score_convention(
            scores,
            labels,
            ignore,
            names,
            convention="uninterpolated",
            difficult=difficult,
            without_labels=without_labels,
        )
        rows = labels.any(axis=1) if without_labels == "dropped" else np.full(n, True)
        counted = rows[:, None] & ~(ignore & (difficult == "ignored"))
        for i in range(c):
            m = counted[:, i]
            if labels[m, i].any():
                expected = sklearn_metrics.average_precision_score(labels[m, i], scores[m, i])
                assert found["AP"][names[i]] == pytest.approx(expected, abs=1e-12)
            else:
                assert found["AP"][names[i]] is None
        flat = labels[counted], scores[counted] > 0.5
        expected = sklearn_metrics.precision_score(*flat, zero_division=0)
        assert found["threshold_0.5"]["OP"] == pytest.approx(expected)
        expected = sklearn_metrics.f1_score(*flat, zero_division=0)
        assert found["threshold_0.5"]["OF1"] == pytest.approx(expected)


def test_file_gives_all_eight_conventions(tmp_path: pathlib.Path) -> None:
    scored = score.score_file(_save(tmp_path / "predictions.npz"))
    keys = {(r["AP_convention"], r["difficult"], r["without_labels"]) for r in scored["results"]}
    assert len(keys) == len(scored["results"]) == 8
    facts = {
        key: value for key, value in scored.items() if key not in ("results", "sha256", "file")
    }
    assert facts == {
        "images": 5,
        "classes": NAMES,
        "images_without_labels": 2,
        "difficult_entries": 1,
        "unknown_entries": 0,
    }


def test_nothing_left_is_no_number(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "p.npz", labels=np.zeros_like(LABELS))
    scored = score.score_file(path)
    for row in scored["results"]:
        assert row["mAP"] is None
        assert row["images"] == (5 if row["without_labels"] == "kept" else 0)
    out = tmp_path / "scores.json"
    done = _run(path, f"--json={out}")
    assert done.returncode == 0, done.stderr
    assert "–" in done.stdout
    assert json.loads(out.read_text()) == scored


def test_command_prints_and_writes_the_numbers(tmp_path: pathlib.Path) -> None:
    path, out = _save(tmp_path / "predictions.npz"), tmp_path / "scores.json"
    done = _run(path, f"--json={out}")
    assert done.returncode == 0, done.stderr
    assert "5 images, 2 classes, 2 images without labels, 1 difficult entries" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 80
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ignored", "kept", "5", "91.67", "91.67"] in lines
    assert ["negative", "kept", "5", "87.50", "87.50"] in lines
    assert ["negative", "dropped", "3", "100.00", "100.00"] in lines
    above = [
        "ignored",
        "kept",
        "above",
        "0.5",
        "58.33",
        "100.00",
        "73.68",
        "60.00",
        "100.00",
        "75.00",
    ]
    assert above in lines
    stored = json.loads(out.read_text())
    assert stored == score.score_file(path)
    assert stored["results"][0]["top_3"]["OF1"] == pytest.approx(0.75)


def test_a_run_stands_for_its_predictions(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "predictions.npz")
    by_folder, by_file = _run(str(tmp_path)), _run(path)
    assert (by_folder.returncode, by_folder.stdout) == (0, by_file.stdout)


def test_a_place_that_is_refused_is_refused_first(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "predictions"
    pathlib.Path(_save(tmp_path / "a.npz")).rename(path)
    before = path.read_bytes()
    for place, message in (
        (tmp_path / "none" / "a.json", "none; make it first"),
        (path, "this command reads it"),
    ):
        done = _run(str(path), f"--json={place}")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: --json={place} cannot be written: ")
        assert message in done.stderr
    assert path.read_bytes() == before


def test_a_link_is_written_through(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kept").mkdir()
    link, target = tmp_path / "a.json", tmp_path / "kept" / "a.json"
    link.symlink_to("kept/a.json")
    path = _save(tmp_path / "predictions.npz")
    for _ in ("that does not exist yet", "that does"):
        assert _run(path, f"--json={link}").returncode == 0
        assert link.is_symlink()
        assert json.loads(target.read_text()) == score.score_file(path)
        target.write_text("old")
    assert [file.name for file in target.parent.iterdir()] == ["a.json"]


class _Trap:
    """Sets a flag when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import sys; sys.clsl_trap_sprung = True",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "lacks scores"),
        ({"ids": np.array([_Trap()] * 5)}, "damaged or of a foreign kind"),
        ({"scores": SCORES * 3 - 1}, "probabilities"),
        ({"scores": np.where(SCORES > 0.8, np.nan, SCORES)}, "probabilities"),
        ({"scores": SCORES[:4]}, r"labels have shape \[5, 2\], scores have \[4, 2\]"),
        ({"scores": SCORES[:0]}, "expected float"),
        ({"scores": (SCORES > 0.5).astype(int)}, "scores are int64"),
        ({"labels": LABELS * 2}, "expected 1, 0 or -1"),
        ({"labels": LABELS.astype(np.float32)}, "labels are float32"),
        ({"ignore": IGNORE.astype(int)}, "ignore is int64"),
        ({"class_names": np.array(["a"])}, "class_names have shape"),
        ({"class_names": np.array([1, 2])}, "expected text"),
    ],
)
def test_foreign_files_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, object], message: str
) -> None:
    path = _save(tmp_path / "predictions.npz", **changes)
    with pytest.raises(InputError, match=message):
        score.load_predictions(path)
    assert not hasattr(sys, "clsl_trap_sprung")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "predictions.npz"
    content = bytearray(pathlib.Path(_save(path)).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        found = score.load_predictions(str(path))
    except InputError as error:
        message = str(error)
        found = {"labels": LABELS, "scores": SCORES.astype(np.float32)}
    else:
        message = str(path)
    assert str(path) in message
    np.testing.assert_array_equal(found["labels"], LABELS)
    np.testing.assert_array_equal(found["scores"], SCORES.astype(np.float32))


def test_command_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    whole = _save(tmp_path / "predictions.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(pathlib.Path(whole).read_bytes()[:-50])
    text = tmp_path / "text.npz"
    text.write_text("scores")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ((), "0 prediction files given"),
        ((whole, whole), "2 prediction files given"),
        ((str(tmp_path / "none.npz"),), "there is no such file"),
        ((str(tmp_path / "folder"),), "folder/predictions.npz: there is no such file"),
        ((str(cut),), "cut.npz is not an .npz file"),
        ((str(text),), "text.npz is not an .npz file"),
        ((whole, "--jsn=a"), "jsn"),
        ((whole, "--json=/nowhere/a.json"), "/nowhere/a.json cannot be written"),
    ):
        done = _run(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
