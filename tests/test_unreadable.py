"""A training image that cannot be read: replaced, named and counted, or the end of the run."""

import json

import pytest
from commands import CONFIG, TINY, run, run_several
from preparing import DRAWN, drawn_set


def damaged(split, row, encoded, labels):
    return (b"no image at all" if split == "train" and row in (5, 6) else encoded), labels


@pytest.mark.slow
def test_it_is_replaced_and_named_or_ends_the_run(shared, tmp_path):
    drawn_set(tmp_path / "data", ("red", "green", "blue"), damaged)
    arguments = (*DRAWN, f"--config.data.dir={tmp_path / 'data'}")
    most = "--config.data.max_unreadable"
    status, out, err = run(shared, tmp_path / "run", *arguments, f"{most}=0.0625")
    assert status == 0, err
    for row in (5, 6):
        assert out.count(f"Training image train-{row} cannot be read") == 1
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["unreadable_training_images"] == ["train-5", "train-6"]
    again = run(shared, tmp_path / "run", *arguments, f"{most}=0.0625")
    assert again[0] == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result

    status, _, err = run(shared, tmp_path / "other", *arguments, f"{most}=0.06")
    assert status == 2
    assert err.startswith("error: 2 of 32 training images cannot be read (train-5, train-6)")
    assert "data.max_unreadable=0.06" in err


@pytest.mark.slow
def test_what_another_process_could_not_read_is_named_by_the_first(shared, tmp_path):
    drawn_set(tmp_path / "data", ("red", "green", "blue"), damaged)
    statuses, said = run_several(
        shared, tmp_path / "run", f"--config={CONFIG}", *TINY, *DRAWN, "--config.epochs=1",
        f"--config.data.dir={tmp_path / 'data'}", "--config.data.max_unreadable=0.0625",
        processes=2, devices=1,
    )  # fmt: skip
    assert statuses == [0, 0], said
    for row in (5, 6):
        assert said[0].count(f"Training image train-{row} cannot be read") == 1
    assert said[0].count("cannot be read by another process") == 1
