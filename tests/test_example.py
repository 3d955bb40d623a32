"""The example folder: what is in it, that it prepares, and what its planted errors give."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from preparing import REPOSITORY, prepare

from clsl_jax import example
from clsl_jax.data import images, scenes, sources


def _rows(folder):
    with open(folder / "labels.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "clsl_jax.example", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_table_shows_a_part_of_what_the_scenes_hold(tmp_path):
    assert example.write_example(tmp_path / "mine", images=60, unknown=0.3, seed=5) == []
    header, *rows = _rows(tmp_path / "mine")
    assert header == ["image", *scenes.CLASS_NAMES]
    assert len(rows) == 60
    parts = scenes.load_parts("train")
    for index, (name, *cells) in enumerate(rows):
        scene, labels, _ = scenes.compose_scene(
            parts, seed=5, split="train", index=index, strength="moderate"
        )
        assert all(cell in ("", str(label)) for cell, label in zip(cells, labels, strict=True))
        pixels = images.decode_image((tmp_path / "mine" / name).read_bytes())
        assert pixels.shape == (128, 128, 3)
        small = pixels.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(small - scene).mean() < 8
    share = np.mean([cell == "" for row in rows for cell in row[1:]])
    assert abs(share - 0.3) < 0.05
    assert len(list((tmp_path / "mine").rglob("*"))) == 60 + 2
    example.write_example(tmp_path / "again", images=60, unknown=0.3, seed=5)
    for path in (tmp_path / "mine").rglob("*.*"):
        copy = tmp_path / "again" / path.relative_to(tmp_path / "mine")
        assert copy.read_bytes() == path.read_bytes()
    example.write_example(tmp_path / "other", images=60, unknown=0.3, seed=6)
    assert _rows(tmp_path / "other") != _rows(tmp_path / "mine")


@pytest.mark.slow
def test_it_prepares_as_it_is(tmp_path):
    done = _command(f"--out={tmp_path / 'my photos'}", "--images=40")
    assert done.returncode == 0, done.stderr
    assert "labels.csv: 40 rows, 20 classes, 30 % of the cells empty\n" in done.stdout
    source, out = tmp_path / "my photos", tmp_path / "out"
    next_line = done.stdout.splitlines()[-1]
    assert next_line.endswith(f"--dataset=table --source='{source}' --out=DATA")
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert status == 0, errors
    assert "40 images." in shown
    prepared = sources.find_prepared("table", out)
    dataset = sources.load_prepared(prepared, image_size=16, validation_fraction=0)
    expected = {name: cells for name, *cells in _rows(source)[1:]}
    for split in (dataset.train, dataset.test):
        for name, labels in zip(split.ids, split.labels.tolist(), strict=True):
            assert labels == [int(cell or -1) for cell in expected.pop(name)]
    assert not expected


@pytest.mark.slow
def test_planted_errors_are_found(tmp_path):
    source, out = tmp_path / "mine", tmp_path / "out"
    done = _command(f"--out={source}", "--faults")
    assert done.returncode == 0, done.stderr
    planted = done.stdout.partition("Wrong on purpose:\n")[2].splitlines()[:5]
    numbers = [int(line.split()[1].rstrip(":")) for line in planted]
    assert len(set(numbers)) == 5
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert status == 2
    for number in numbers:
        assert f"\n  row {number}, column " in errors
    header, *rows = _rows(source)
    # With the cells put right, what is left is the image that is cut off.
    rows[numbers[0] - 2][3] = rows[numbers[1] - 2][7] = ""
    kept = [row for number, row in enumerate(rows, 2) if number not in numbers[2:4]]
    with open(source / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert status == 2
    assert errors.startswith("error: 1 unreadable image (the first: ")
    assert rows[numbers[4] - 2][0] in errors
    flags = ("--dataset=table", f"--source={source}", f"--out={out}", "--leave_out=unreadable")
    status, shown, errors = prepare(*flags)
    assert status == 0, errors
    assert "197 images." in shown


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"--out=.*{name} is there already"):
            example.write_example(tmp_path / name, images=20, seed=0)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match=r"--out=.* cannot be written"):
        example.write_example(tmp_path / "file" / "below", images=20, seed=0)
    example.write_example(tmp_path / "empty", images=20, unknown=0.0, seed=0)
    assert all(cell in "01" and cell for row in _rows(tmp_path / "empty")[1:] for cell in row[1:])
    for options, expected in (
        ({"images": 19}, "--images=19: expected 20 to 10,000"),
        ({"unknown": 1.0}, "--unknown=1.0"),
    ):
        with pytest.raises(ValueError, match=expected):
            example.write_example(tmp_path / "new", seed=0, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--out=DIR is missing"),
        (["--out=x", "more"], "Unexpected argument 'more'"),
        (["--out=x", "--images=3"], "expected 20 to 10,000"),
        (["--out=x", "--seed=-1"], "seed"),
        (["--out=x", f"--seed={2**32}"], "flag --seed="),
    ],
)
@pytest.mark.slow
def test_the_command_refuses(flags, expected):
    done = _command(*flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
