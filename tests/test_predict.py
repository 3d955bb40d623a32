"""A trained run applied to image files, in processes of its own and as a function."""

import csv
import dataclasses
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import REPOSITORY, TINY, environment
from PIL import Image

from clsl_jax import predict
from clsl_jax.data import sources
from clsl_jax.data.images import encode_png
from clsl_jax.errors import InputError

SIZES = {"train": 96, "validation": 48, "test": 48}  # of TINY


@pytest.fixture(scope="module")
def finished(shared, tiny_run, tmp_path_factory):
    """A run, and a folder with its test images as files."""
    assert "--config.data.sizes=(96,48,48)" in TINY
    home = tmp_path_factory.mktemp("predict")
    shutil.copytree(tiny_run[0], home / "run")
    scenes = sources.load_dataset(
        "scenes", directory=os.path.join(shared, "data"), image_size=64, sizes=SIZES
    )
    os.makedirs(home / "new" / "deeper")
    for row, name in enumerate(scenes.test.ids):
        folder = home / "new" / ("deeper" if row % 2 else "")
        (folder / f"{name}.png").write_bytes(encode_png(scenes.test.images[row]["image"]))
    return home / "run", home / "new"


def command(shared, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "clsl_jax.predict", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(shared),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def files_of(directory):
    return {
        os.path.join(folder, name): os.stat(os.path.join(folder, name)).st_mtime_ns
        for folder, _, names in os.walk(directory)
        for name in names
    }


@pytest.mark.slow
def test_what_a_run_said_of_its_test_images_it_says_of_their_files(shared, finished, tmp_path):
    workdir, new = finished
    before = files_of(workdir)
    out, sheet = tmp_path / "out.csv", tmp_path / "sheet.png"
    shown = ("--weights=last", f"--pictures={sheet}", "--pictured=2")
    status, printed, err = command(shared, f"--workdir={workdir}", f"--out={out}", *shown, new)
    assert (status, err) == (0, "")
    assert "48 images, 20 classes, weights of epoch 4" in printed
    assert files_of(workdir) == before
    header, *rows = table(out)
    said = table(workdir / "probabilities.csv")
    assert header == ["image", *said[0][2:]]
    expected = {row[0]: row[2:] for row in said[1:] if row[1] == "test"}
    assert len(rows) == len(expected) == 48
    for path, *numbers in rows:
        assert os.path.isfile(path)
        assert numbers == expected[os.path.basename(path).removesuffix(".png")]
    with Image.open(sheet) as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_the_best_weights_of_another_place_without_the_data(finished, tmp_path, monkeypatch):
    workdir, new = finished
    six = jax.devices()[:6]
    monkeypatch.setattr(jax, "devices", lambda: six)
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    classifier = predict.load_classifier(os.fspath(moved))
    with np.load(workdir / "predictions.npz") as stored:
        assert classifier.class_names == tuple(stored["class_names"])
        ids, scores = stored["ids"].tolist(), stored["scores"]
    paths = predict.find_images([os.fspath(new)])
    rows = [ids.index(os.path.basename(path).removesuffix(".png")) for path in paths]
    images = predict.FileImages(paths, classifier.image_size, upright=classifier.upright)
    found = classifier.probabilities(images, batch_size=16)
    assert classifier.mesh.size == 6  # over which the run's 256 rows would not spread
    np.testing.assert_allclose(found, scores[rows], atol=1e-5)
    assert not images.unreadable
    # Called again, it is not compiled again.
    np.testing.assert_array_equal(classifier.probabilities(images, batch_size=16), found)
    assert classifier._predict_step._cache_size() == 1
    two = np.stack([images[row]["image"] for row in (0, 1)])
    probabilities, heat = classifier.explain(two)
    np.testing.assert_allclose(probabilities, found[:2], atol=1e-5)
    assert (len(heat), heat.shape[-1]) == (2, 20)
    np.testing.assert_allclose(heat.sum(axis=(1, 2)), 1.0, atol=1e-4)
    in_parts = dataclasses.replace(classifier, batch_size=classifier.mesh.size)
    for one_by_one, both in zip(in_parts.explain(two), (probabilities, heat), strict=True):
        np.testing.assert_allclose(one_by_one, both, atol=1e-5)
    assert in_parts._explain_step._cache_size() == 1


@pytest.mark.slow
def test_an_image_that_cannot_be_read_leaves_its_row_empty(shared, finished, tmp_path):
    workdir, new = finished
    whole = next(path for path in sorted(new.iterdir()) if path.is_file())
    shutil.copy(whole, tmp_path / os.fsdecode(b"caf\xe9.png"))  # Latin-1, no UTF-8
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "._b.png").write_bytes(b"of a Macintosh")
    (tmp_path / "notes.txt").write_text("no image either")
    out = tmp_path / "out.csv"
    flags = (f"--workdir={workdir}", f"--out={out}", f"--pictures={tmp_path / 'sheet.png'}")
    status, printed, err = command(shared, *flags, tmp_path)
    assert status == 2
    assert "1 of 2 images cannot be read; their rows are empty:" in err
    assert str(tmp_path / "a.jpg") in err
    assert "Traceback" not in err
    assert f"{tmp_path / 'a.jpg'}: cannot be read" in printed
    _, first, second = table(out)
    assert first == [str(tmp_path / "a.jpg"), *[""] * 20]
    assert second[0] == str(tmp_path / "caf\ufffd.png")
    assert f"{second[0]}: " in printed
    assert (tmp_path / "sheet.png").exists()
    assert all(0 <= float(number) <= 1 for number in second[1:])


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c/d.webp", "c/.hidden.png", ".git/e.png", "f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder, odd = os.fspath(tmp_path), os.fspath(tmp_path / "f.csv")
    expected = [os.path.join(folder, name) for name in ("a.jpeg", "b.PNG", "c/d.webp")]
    assert predict.find_images([folder]) == expected
    assert predict.find_images([odd, folder, folder]) == [odd, *expected]


def test_what_is_passed_over_is_counted(tmp_path):
    names = ["a.jpg", "b.HEIC", "c.heic", "in/d.dng", "in/e", "in/.hidden", ".git/f.dng"]
    names += ["in/clip.mpg", "in/features.h5"]  # of which Pillow knows the endings
    for name in names:
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).touch()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "g.png").touch()
    new, whole, lines = tmp_path / "new", tmp_path / "whole", []
    for folder in (new, new / "in"):
        (folder / "linked").symlink_to(whole)
    found = predict.find_images([os.fspath(new), os.fspath(whole)], report=lines.append)
    assert found == [f"{new}/a.jpg", f"{whole}/g.png"]
    (line,) = lines
    assert line.startswith(
        f"Passed over in {new}: 2 .heic, 1 .mpg, 1 .dng, 1 without an ending, 1 .h5, 2 "
        "linked folders (an image in a folder is known by its ending"
    )
    # What is named by itself is taken.
    by_name = [f"{new}/in/linked", f"{new}/b.HEIC"]
    found = predict.find_images(by_name, report=lines.append)
    assert (found, len(lines)) == ([f"{new}/in/linked/g.png", f"{new}/b.HEIC"], 1)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """As one that may not be read; this one's path is too long, which is so for root as well."""
    (tmp_path / "a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("b" * 250)
        os.chdir("b" * 250)
    lines = []
    assert predict.find_images([os.fspath(tmp_path)], report=lines.append) == [f"{tmp_path}/a.jpg"]
    (line,) = lines
    assert line.startswith(f"Passed over: {tmp_path}/bbb")
    assert line.endswith("bbb (File name too long)")


def test_a_photograph_is_not_taken_for_the_table(shared, tmp_path):
    """As where the shell writes `--out *.jpg` out, the table forgotten."""
    photographs = [tmp_path / name for name in ("a.jpg", "b.jpg")]
    for path in photographs:
        path.write_text(path.name)
    status, _, err = command(shared, "--workdir=RUN", "--out", *photographs)
    assert status == 2
    assert (
        f"--out={photographs[0]} cannot be written: it is there and ends in .jpg, not .csv" in err
    )
    sheet = tmp_path / "c.png"
    sheet.write_text("c")
    flags = ("--workdir=RUN", f"--out={tmp_path / 'new.csv'}", f"--pictures={sheet}")
    status, _, err = command(shared, *flags, tmp_path)
    assert status == 2
    assert f"--pictures={sheet} cannot be written: this command reads it" in err
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["a.jpg", "b.jpg", "c"]


def test_places_without_images(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such file or folder"):
        predict.find_images([os.fspath(tmp_path), os.fspath(tmp_path / "nowhere")])
    with pytest.raises(InputError, match=r"There is no image in .*looked for names that end in"):
        predict.find_images([os.fspath(tmp_path)])


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="There is no run in --workdir="):
        predict.load_classifier(os.fspath(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("label_embeddings.npz", "label_embeddings.npz: there is no such file"),
        ("known_mask.npz", "known_mask.npz: there is no such file"),
        ("checkpoints", "holds no checkpoint"),
    ],
)
def test_a_run_that_lacks_something(finished, tmp_path, name, match):
    moved = tmp_path / "moved"
    shutil.copytree(finished[0], moved)
    place = moved / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(InputError, match=match):
        predict.load_classifier(os.fspath(moved))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir=DIR is missing"),
        (("--workdir=RUN", "--out=o.csv"), "No images are named"),
        (("--workdir=RUN", "--out=nowhere/o.csv", "docs"), "there is no folder nowhere; make it"),
    ],
)
def test_wrong_arguments(shared, arguments, message):
    status, _, err = command(shared, *arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
