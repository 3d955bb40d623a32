"""Preparing as such: broken images, copies, being killed, and what the command refuses."""

import contextlib
import json
import os
import resource
import runpy
import shlex
import time

import numpy as np
import pytest
from preparing import REPOSITORY, coco_tree, command, picture, prepare, write

from clsl_jax import prepare as prepare_lib
from clsl_jax.data import inspection, shards, sources, stored
from clsl_jax.data.formats.listing import ImageList, Listing
from clsl_jax.errors import InputError


def _listing(folder, contents, **options):
    """A set of these files: {split: {name: bytes, or None if it is missing}}."""
    splits = {}
    for split, files in contents.items():
        for name, content in files.items():
            if content is not None:
                write(folder / name, content)
        labels = np.arange(len(files))[:, None] % 2 == np.arange(2)
        splits[split] = ImageList(
            [folder / name for name in files], list(files), labels.astype(np.int8)
        )
    return Listing(name="table", class_names=("a", "b"), splits=splits, **options)


def _prepare(listing, out, **options):
    said = []
    directory = prepare_lib.prepare(
        listing, source="here", out=out, workers=2, say=said.append, **options
    )
    return directory, "\n".join(said)


def test_broken_images_are_told_apart(tmp_path):
    noise = picture(0, size=(40, 40))
    contents = {
        "train": {
            "whole.jpg": noise,
            "cut.jpg": noise[: len(noise) // 2],
            "none.jpg": b"<html>404</html>",
            "empty.jpg": b"",
            "gone.jpg": None,
        },
        "test": {"t.png": picture(1, file_format="PNG")},
    }
    listing = _listing(tmp_path / "in", contents)
    states = [inspection.inspect_image(path).state for path in listing.splits["train"].paths]
    assert [states[0], *states[2:]] == ["readable", "unreadable", "unreadable", "missing"]
    # What decodes although it is cut off is used; this differs between decoders.
    assert states[1] in ("damaged", "unreadable")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 missing image \(the first: .*gone.jpg"):
        _prepare(listing, out)
    assert "none.jpg" in (out / "table" / "report.txt").read_text()
    with pytest.raises(ValueError, match=r"unreadable image(.|\n)*--leave_out=missing,unreadable"):
        _prepare(listing, out, leave_out=["missing"])
    directory, said = _prepare(listing, out, leave_out=["missing", "unreadable"])
    assert "Images in train that are missing: 1\n  " in said
    found = stored.open_prepared(directory)
    assert found.ids["train"] == [
        name
        for name, state in zip(contents["train"], states, strict=True)
        if state in ("readable", "damaged")
    ]
    assert found.facts["left_out"]["train"]["missing"] == 1


def test_copies_and_leaks_are_reported(tmp_path):
    same, other = picture(0), picture(1)
    contents = {
        "train": {"a.jpg": same, "b.jpg": other, "c.jpg": same},
        "test": {"d.jpg": same, "e.jpg": picture(2)},
    }
    directory, said = _prepare(_listing(tmp_path / "in", contents), tmp_path / "out")
    assert "Images that several splits share: 1\n  train: a.jpg, c.jpg; test: d.jpg\n" in said
    assert "Images that a split has more than once: 1\n  train: a.jpg, c.jpg\n" in said
    report = json.loads((tmp_path / "out/table/report.json").read_text())
    assert report["leaks"] == [{"train": ["a.jpg", "c.jpg"], "test": ["d.jpg"]}]
    assert stored.open_prepared(directory).facts["leaks"] == 1


def test_a_test_split_of_ours_shares_no_image_with_training(tmp_path):
    files = {f"{row}.jpg": picture(row // 2) for row in range(40)}
    listing = _listing(tmp_path / "in", {"train": files})
    directory, said = _prepare(listing, tmp_path / "out", test_fraction=0.25)
    found = stored.open_prepared(directory)
    assert (len(found.ids["train"]), len(found.ids["test"])) == (30, 10)
    parts = [{int(name[:-4]) // 2 for name in found.ids[split]} for split in ("train", "test")]
    assert not parts[0] & parts[1]
    assert "several splits" not in said
    _, again = _prepare(listing, tmp_path / "other", test_fraction=0.25, seed=1)
    assert "seed 1" in again


def test_check_only_writes_nothing(tmp_path):
    source = coco_tree(tmp_path / "coco")
    out = tmp_path / "out"
    for flags in (("--check-only",), ("--check_only", f"--out={out}")):
        status, shown, errors = prepare("--dataset=coco2014", f"--source={source}", *flags)
        assert (status, errors) == (0, "")
        assert "4 (published: 82,783)" in shown
        assert "Train on it" not in shown
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["inspected.jsonl"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dataset=imagenet"], "imagenet"),
        (["--dataset=voc2007", "--out=x"], "--source=PATH is missing"),
        (["--dataset=voc2007", "--source=."], "--out=DIR is missing"),
        (
            ["--dataset=voc2007", f"--source=/{'long' * 99}", "--out=x"],
            "does not exist or may not be read; expected the folder of the set",
        ),
        (["--dataset=voc2007", "--source=.", "--out=x", "--cells=?"], "--cells has no meaning"),
        (["--dataset=table", "--source=.", "--out=x", "--cells=maybe"], "choose of yes/no"),
        (["--dataset=table", "--source=.", "--out=x", f"--seed={2**32}"], "flag --seed="),
        (["--dataset=table", "--source=.", "--out=x", "more"], "Unexpected argument 'more'"),
    ],
)
def test_the_command_refuses(flags, expected):
    status, shown, errors = prepare(*flags)
    assert status == 2
    assert expected in errors
    assert errors.count("\n") <= 2
    assert shown == ""


def test_a_stopped_check_goes_on(tmp_path):
    files = {f"{row}.jpg": picture(row) for row in range(6)}
    paths = _listing(tmp_path, {"train": files}).splits["train"].paths
    journal = tmp_path / "j"
    first = inspection.inspect_images(paths[:4], workers=1, journal=journal)
    # Killed in the middle of a line; and one file is another one now.
    journal.write_text(journal.read_text() + '["half a li')
    write(paths[1], picture(77, size=(9, 9)))
    before = len(journal.read_text().splitlines())
    second = inspection.inspect_images(paths, workers=1, journal=journal)
    added = [json.loads(line)[0] for line in journal.read_text().splitlines()[before:] if line]
    assert added == [str(tmp_path / f"{row}.jpg") for row in (1, 4, 5)]
    assert second[0] == first[0]
    assert (second[1].width, second[1].height) == (9, 9)
    assert inspection.inspect_images(paths, workers=2, journal=journal) == second


def _examples(count, stop=None):
    class Examples(list):
        def __getitem__(self, row):
            if row == stop:
                raise RuntimeError("stopped")
            self.append(row)
            return stored.Example(b"%06d" % row, np.array([row % 2], np.int8), str(row))

        def __len__(self):
            return count

    return Examples()


def _store(examples, root, **options):
    return stored.prepare(
        root,
        name="n",
        config="c",
        version="1.0.0",
        class_names=("a",),
        splits={"train": examples},
        **options,
    )


def test_writing_goes_on_behind_the_last_whole_file(tmp_path):
    def store(examples, root, resume="r"):
        return _store(examples, root, resume=resume, shard_bytes=500)

    with pytest.raises(RuntimeError, match="stopped"):
        store(_examples(100, stop=90), tmp_path / "a")
    assert not list((tmp_path / "a").glob("n/c"))
    whole = len(list((tmp_path / "a").rglob("*.npz")))
    assert whole >= 2
    rest = _examples(100)
    directory = store(rest, tmp_path / "a")
    start = list.__getitem__(rest, 0)
    assert start > 0
    assert sorted(rest.copy()) == list(range(start, 100))
    assert not list((tmp_path / "a").glob("n/.incomplete-*"))
    straight = store(_examples(100), tmp_path / "b", resume="")
    found, expected = stored.open_prepared(directory), stored.open_prepared(straight)
    assert found.fingerprint == expected.fingerprint
    assert found.ids["train"] == [str(row) for row in range(100)]
    names = sorted(path.name for path in straight.iterdir())
    assert sorted(path.name for path in directory.iterdir()) == names
    assert len([name for name in names if "array_record" in name]) > 3
    images = stored.StoredImages(found, "train", 8)
    assert [images._encoded(row) for row in (0, 57, 99)] == [b"000000", b"000057", b"000099"]


def test_a_shard_that_was_cut_off_is_written_again(tmp_path):
    def write_split():
        return shards.write_split(
            tmp_path, "s", _examples(30), lambda example: example.image, shard_bytes=60
        )

    first = write_split()
    assert first.lengths == [10, 10, 10]
    before = [path.read_bytes() for path in first.shards]
    first.shards[1].write_bytes(before[1][:10])
    again = write_split()
    assert [path.read_bytes() for path in again.shards] == before
    assert again.ids.tolist() == [str(row) for row in range(30)]
    with pytest.raises(ValueError, match="no example"):
        shards.write_split(tmp_path, "none", [], lambda example: b"")


@contextlib.contextmanager
def _no_file_beyond(size):
    """A limit on the size of files stands for the end of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("resume", ["r", ""])
def test_a_full_disk_is_one_error_and_leaves_nothing_that_looks_whole(tmp_path, resume):
    def store(root, facts=lambda labels: {}):
        return _store(_examples(100), root, facts=facts, resume=resume, shard_bytes=1000)

    root = tmp_path / "full"
    said = "n cannot be written to .*File too large.*: make room there, or name another directory"
    for size in (100, 2000):  # in the first shard; in its note, or a later one
        with _no_file_beyond(size), pytest.raises(InputError, match=said):
            store(root)
    with contextlib.ExitStack() as full, pytest.raises(InputError, match=said):
        # Facts are measured when all shards are there, before the files on the whole.
        store(root, lambda labels: full.enter_context(_no_file_beyond(300)) or {})
    assert [path.name for path in (root / "n").iterdir()] == [".incomplete-r"] * bool(resume)
    found, expected = (stored.open_prepared(store(place)) for place in (root, tmp_path / "roomy"))
    assert found.fingerprint == expected.fingerprint
    for path in expected.directory.iterdir():
        assert (found.directory / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in (root / "n").iterdir()] == ["c"]


def test_a_broken_image_does_not_change_the_report_on_what_is_prepared(tmp_path):
    files = {f"{row}.jpg": picture(row) for row in range(4)}
    out = tmp_path / "out"
    _prepare(_listing(tmp_path / "in", {"train": files, "test": {"t.jpg": picture(9)}}), out)
    before = (out / "table" / "report.txt").read_text()
    more = {**files, "gone.jpg": None}
    listing = _listing(tmp_path / "in", {"train": more, "test": {"t.jpg": picture(9)}})
    # Left out, it leaves what is prepared already; and what is reported then are these files.
    with pytest.raises(InputError, match="1 missing image"):
        _prepare(listing, out)
    assert (out / "table" / "report.txt").read_text() != before
    _prepare(listing, out, leave_out=["missing"])
    before = (out / "table" / "report.txt").read_text()
    less = {name: None if name == "0.jpg" else content for name, content in files.items()}
    (tmp_path / "in" / "0.jpg").unlink()
    listing = _listing(tmp_path / "in", {"train": less, "test": {"t.jpg": picture(9)}})
    with pytest.raises(InputError, match="1 missing image"):
        _prepare(listing, out)
    with pytest.raises(InputError, match="holds other images or labels"):
        _prepare(listing, out, leave_out=["missing"])
    assert (out / "table" / "report.txt").read_text() == before


def _labelled(folder, **labels):
    """A set with these labels, (a, b) an image of each split."""
    splits = {}
    for split, rows in labels.items():
        for row in range(len(rows)):
            write(folder / f"{split}{row}.jpg", picture(1000 * len(split) + row))
        names = [f"{split}{row}.jpg" for row in range(len(rows))]
        paths = [folder / name for name in names]
        splits[split] = ImageList(paths, names, np.array(rows, np.int8))
    return Listing(name="table", class_names=("a", "b"), splits=splits)


ABSENT = "Note: No training label says that something is absent."
NONE_TO_RECOVER = "Note: No training label is unknown, so that there is none to recover."
TEST = [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("train", "notes"),
    [
        ([(1, 0), (0, 1)], [NONE_TO_RECOVER]),
        ([(1, -1), (0, 1)], []),
        (
            [(1, -1), (0, -1)],
            ["Note: No training label is known of b: what is found of it means nothing."],
        ),
        ([(1, -1), (-1, 1)], [ABSENT]),
    ],
)
def test_what_the_labels_cannot_teach_is_noted(tmp_path, train, notes):
    _, said = _prepare(
        _labelled(tmp_path, train=train, test=TEST), None, check_only=True, leave_out=()
    )
    told = [line for line in said.splitlines() if line.startswith("Note: ")]
    assert [line[: len(note)] for line, note in zip(told, notes, strict=True)] == notes


def test_without_any_known_label_nothing_is_read(tmp_path):
    listing = _labelled(tmp_path, train=[(-1, -1)] * 3, test=TEST)
    with pytest.raises(InputError, match="table: no label of a training image is known"):
        _prepare(listing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "config", "given"),
    [
        ({"train": 20 * TEST, "test": TEST}, "table.py", []),  # 34 remain for training
        ({"train": 18 * TEST, "test": TEST}, "table.py", ["batch_size=16"]),  # 31
        ({"train": 15 * TEST, "validation": TEST, "test": TEST}, "table.py", ["batch_size=16"]),
        ({"train": 16 * TEST, "validation": TEST, "test": TEST}, "table.py", []),
        ({"train": [(1, -1), (-1, 1)] * 20, "test": TEST}, "table.py:positives", []),
        (
            {"train": 3 * TEST, "test": TEST},
            "table.py",
            ["validation_fraction=0.3", "batch_size=4"],
        ),
        ({"train": TEST, "validation": TEST, "test": TEST}, "table.py", ["batch_size=2"]),
        ({"train": [(1, 0)], "validation": TEST, "test": TEST}, None, []),
        ({"train": [(0, 0)] * 40, "test": TEST}, None, []),
        ({"train": [(1, 1)] * 40, "test": TEST}, None, []),
        ({"train": 20 * TEST, "validation": [(1, -1), (-1, 0)], "test": TEST}, None, []),
    ],
)
def test_the_command_that_trains_fits_the_labels(tmp_path, labels, config, given):
    directory, said = _prepare(_labelled(tmp_path, **labels), tmp_path / "out")
    last = said.splitlines()[-1]
    if config is None:
        assert last.startswith("It cannot be trained on yet: ")
        return
    words = shlex.split(last.removeprefix("Train on it: "))
    assert words[:4] == ["python", "-m", "clsl_jax.main", f"--config=configs/{config}"]
    keys = dict(word.removeprefix("--config.").split("=") for word in words[4:-1])
    assert keys.pop("data.dir") == str(tmp_path / "out")
    assert words[-1] == "--workdir=RUN"
    assert [f"{key.removeprefix('data.')}={value}" for key, value in keys.items()] == given
    # And the configuration is the one that this was measured by.
    own = runpy.run_path(os.path.join(REPOSITORY, "configs", "table.py"))["get_config"]()
    assert (own.batch_size, own.data.validation_fraction) == (
        prepare_lib._BATCH_SIZE,
        prepare_lib._VALIDATION_FRACTIONS[0],
    )
    dataset = sources.load_prepared(
        directory,
        name="table",
        image_size=8,
        seed=own.data.seed,
        validation_fraction=float(keys.get("data.validation_fraction", 0.15)),
    )
    assert int(keys.get("batch_size", own.batch_size)) <= len(dataset.train.ids)


def test_every_set_has_a_configuration_that_trains_it():
    assert prepare_lib._CONFIGS.keys() == set(sources.PREPARED_NAMES)
    for name, (file, other) in prepare_lib._CONFIGS.items():
        path = os.path.join(REPOSITORY, "configs", f"{file}.py")
        own = runpy.run_path(path)["get_config"]().data.name
        assert (own != name) == other


def test_a_share_for_testing_is_more_than_nothing(tmp_path):
    files = {f"{row}.jpg": picture(row) for row in range(3)}
    listing = _listing(tmp_path / "in", {"train": files})
    with pytest.raises(InputError, match=r"--test_fraction=0: expected more than 0"):
        _prepare(listing, None, check_only=True, test_fraction=0.0)
    listing = _listing(tmp_path / "in", {"train": files, "test": files})
    _prepare(listing, None, check_only=True, test_fraction=0.0)


def test_the_command_that_trains_can_be_copied(tmp_path):
    listing = _labelled(tmp_path / "in", train=20 * TEST)
    _, said = _prepare(listing, tmp_path / "my sets")
    words = shlex.split(said.splitlines()[-1])
    assert f"--config.data.dir={tmp_path / 'my sets'}" in words
    with pytest.raises(InputError, match="holds no prepared copy") as error:
        sources.find_prepared("voc2007", tmp_path / "my sets")
    command_ = str(error.value).split("`")[1]
    assert f"--out={tmp_path / 'my sets'}" in shlex.split(command_)


def test_what_is_gone_on_with_is_not_swept_away(tmp_path):
    (tmp_path / ".incomplete-mine").mkdir()
    (tmp_path / ".incomplete-mine" / "a shard").write_bytes(b"whole")
    (tmp_path / ".incomplete-other").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    with stored._staging(tmp_path, "mine") as staging:
        assert (staging / "a shard").read_bytes() == b"whole"
        assert [path.name for path in tmp_path.iterdir()] == [staging.name]


def test_two_processes_do_not_write_the_same_content_at_once(tmp_path):
    with (
        stored._staging(tmp_path, "r"),
        pytest.raises(ValueError, match="another process"),
        stored._staging(tmp_path, "r"),
    ):
        pass


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_that_looks_whole(tmp_path):
    import subprocess

    count = 3000
    source = tmp_path / "in"
    encoded = picture(0, size=(200, 200), file_format="PNG")
    lines = ["image,split,a"]
    for row in range(count):
        # A PNG may be followed by anything: every file is another one.
        write(source / f"{row}.png", encoded + b"%d" % row)
        lines.append(f"{row}.png,{'test' if row % 10 == 0 else 'train'},{row % 2}")
    write(source / "t.csv", "\n".join(lines))
    out = tmp_path / "out"
    flags = ("--dataset=table", f"--source={source}", f"--out={out}", "--workers=2")
    for pattern in ("table/inspected.jsonl", "table/.incomplete-*/*.array_record"):
        process = subprocess.Popen(
            command(*flags), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 120
            while not any(path.stat().st_size for path in out.glob(pattern)):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        with pytest.raises(ValueError, match="no prepared copy"):
            sources.find_prepared("table", out)
    status, shown, errors = prepare(*flags)
    assert status == 0, errors
    assert f"{count:,} images." in shown
    left = sorted(path.name for path in (out / "table").iterdir())
    assert left == ["prepared", "report.json", "report.txt"]
    found = stored.open_prepared(sources.find_prepared("table", out))
    assert len(found.ids["train"]) == 2700
