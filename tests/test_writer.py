"""Logs: rows after a checkpoint are dropped, half lines too, and files are written whole."""

import json
import subprocess
import sys

from clsl_jax import atomic
from clsl_jax.writer import RunLog, read_log


def write_rows(workdir, steps, start=0):
    log = RunLog(str(workdir))
    log.start(start)
    for step in steps:
        log.epoch(step, {"epoch": step, "loss": step / 8}, {"seconds": 1.5}, f"epoch {step}")
    log.close()


def test_rows_after_the_checkpoint_are_dropped_and_written_again(tmp_path, capsys):
    write_rows(tmp_path, [1, 2, 3])
    whole = (tmp_path / "log.jsonl").read_bytes()
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 0.')
    write_rows(tmp_path, [3], start=2)
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    assert [row["step"] for row in read_log(tmp_path / "timing.jsonl")] == [1, 2, 3]
    assert "epoch 3" in capsys.readouterr().out


def test_torch_is_left_alone_where_it_is_installed(tmp_path):
    """It would take seconds of every run, and 180 MiB."""
    program = (
        "import sys; from clsl_jax.writer import RunLog; log = RunLog(sys.argv[1]); log.start(0); "
        "log.epoch(1, {'loss': 0.5}, {'seconds': 1.0}, 'epoch 1'); log.close(); "
        "print('torch' in sys.modules); import torch; print(torch.ones(1).item())"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert said.stdout == "epoch 1\nFalse\n1.0\n"


def test_rows_are_json_with_the_step(tmp_path):
    write_rows(tmp_path, [7])
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row == {"step": 7, "epoch": 7, "loss": 0.875}


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("one", "two"):
        atomic.write_text(str(tmp_path / "file"), text)
    assert (tmp_path / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tables_and_bars_can_be_drawn_without_a_terminal(tmp_path, capsys):
    log = RunLog(str(tmp_path))
    with log.progress("epoch 1", total=2, batch_size=4) as bar:
        bar.advance()
        bar.advance()
    log.table("title", ("percent", "mAP"), [("test", "12.34")])
    out = capsys.readouterr().out
    assert "12.34" in out
    assert "title" in out
