"""The record of a run: exact, without gaps or duplicates after a resume, and drawable from its first iteration."""

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dgpo_jax.metrics import HEADER_EVERY, MetricsWriter, progress, read_metrics
from dgpo_jax.plots import PANELS, plot_curves

REPOSITORY = Path(__file__).parent.parent


def write(workdir, iterations, resume_iteration=None, offset=0.0):
    with MetricsWriter(workdir, resume_iteration, console=False) as writer:
        for iteration in iterations:
            writer.write(iteration, {"reward/mean": iteration / 10 + offset, "eval/avg@4": 0.5})
            writer.write_rollouts(iteration, [{"response": "x" * iteration}])
            writer.write_eval(iteration, [{"response": "y"}])


def read_points(workdir):
    """Every (tag, iteration, value) in the TensorBoard files, in order, read with nobody else's reader."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):  # a record: length u64, its checksum u32, the event, its checksum u32
            length = int.from_bytes(content[start : start + 8], "little")
            event = Event.FromString(content[start + 12 : start + 12 + length])
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            start += 16 + length
    return points


def stored_iterations(folder):
    return sorted(int(path.stem.split("_")[1]) for path in folder.iterdir())


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-310, -0.0, 2**53 + 2.0, 1.7976931348623157e308])
def test_floats_read_back_to_the_same_bits(tmp_path, value):
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"python": value, "numpy": np.float64(value), "whole": np.int64(3), "none": None})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["python"].hex() == row["numpy"].hex() == value.hex()
    assert row["whole"] == 3
    assert "none" not in row
    write_again = MetricsWriter(tmp_path, console=False)  # a resume rewrites the file
    write_again.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


def test_a_single_precision_value_keeps_its_bits(tmp_path):
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"loss": np.float32(0.1)})
    assert np.float32(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"]) == np.float32(0.1)


def test_nan_and_infinities_are_null_in_the_file_and_nan_when_read(tmp_path):
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"a": math.nan, "b": np.float32("inf"), "c": 1.0})
    refuse = lambda name: pytest.fail(f"{name} is not JSON")  # noqa: E731
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["a"])
    assert [(tag, math.isnan(value)) for tag, _, value in read_points(tmp_path)] == [("a", 1), ("b", 1), ("c", 0)]


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path, console=False)
    writer.write(0, {"reward/mean": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1  # before close
    writer.close()


def test_an_iteration_written_twice_or_out_of_order_is_refused(tmp_path):
    write(tmp_path, range(3))
    with MetricsWriter(tmp_path, console=False) as writer:  # None: goes on after what is there
        for iteration in (2, 1):
            with pytest.raises(ValueError, match=f"rewind\\({iteration}\\)"):
                writer.write(iteration, {})
        writer.write(3, {})
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "torn",
    [
        b"",
        b'{"iteration": 5, "rewa',  # killed while writing
        b'{"iteration": 5, "note": "\xc3',  # within a character
        b'{"iteration": 5}',  # whole but for its line end: the iteration is run again anyway
        b"\0\0\0\0",  # what a file system may leave after a power cut
    ],
)
def test_a_resume_leaves_no_gap_and_no_duplicate(tmp_path, torn):
    write(tmp_path, range(5))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    before = (tmp_path / "metrics.jsonl").read_text(errors="replace").split("\n")[:3]

    write(tmp_path, range(3, 6), resume_iteration=3, offset=100.0)

    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["reward/mean"] > 100 for row in rows] == [False] * 3 + [True] * 3
    assert (tmp_path / "metrics.jsonl").read_text().split("\n")[:3] == before
    rewards = [(iteration, value) for tag, iteration, value in read_points(tmp_path) if tag == "reward/mean"]
    assert [iteration for iteration, _ in rewards] == [0, 1, 2, 3, 4, 5]
    assert [value for _, value in rewards] == pytest.approx([0.0, 0.1, 0.2, 100.3, 100.4, 100.5])
    assert {tag for tag, _, _ in read_points(tmp_path)} == {"reward/mean", "eval/avg@4"}


def test_a_resume_drops_the_texts_of_iterations_to_come_and_nothing_else(tmp_path):
    write(tmp_path, range(4))
    (tmp_path / "rollouts" / "notes.jsonl").touch()
    with MetricsWriter(tmp_path, resume_iteration=2, console=False):
        (tmp_path / "rollouts" / "notes.jsonl").unlink()
        assert stored_iterations(tmp_path / "rollouts") == stored_iterations(tmp_path / "eval") == [0, 1]


def test_a_resume_at_the_start_drops_everything(tmp_path):
    write(tmp_path, range(4))
    with MetricsWriter(tmp_path, resume_iteration=0, console=False):
        assert read_metrics(tmp_path / "metrics.jsonl") == []
        assert read_points(tmp_path) == []


def test_any_text_a_model_can_emit_is_one_line_of_valid_json(tmp_path):
    rows = [{"response": text, "reward": np.float32(1)} for text in ("a\nb", "\ud800 half a pair", "½ 中 \u2028", '"\\')]
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.write_rollouts(123, rows)
    lines = (tmp_path / "rollouts" / "iteration_000123.jsonl").read_bytes().decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [{**row, "reward": 1.0} for row in rows]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\nrubbish\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_console_is_plain_aligned_lines_where_there_is_no_terminal(tmp_path, capsys):
    metrics = {"reward/mean": 0.25, "rollout/truncated": 0.5, "policy/entropy": math.nan}
    with MetricsWriter(tmp_path) as writer:
        for iteration in range(HEADER_EVERY + 1):
            with progress("sampling", total=3) as advance:
                advance(3)
            evaluated = {"eval/a/avg@4": 0.4, "eval/b/avg@4": 0.6, "eval/greedy": 0.9} if iteration == 1 else {}
            writer.write(iteration, metrics | evaluated)
    output = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in output)
    lines = output.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [number for number, line in enumerate(lines) if "reward" in line] == [0, HEADER_EVERY + 1]
    assert lines[1].split()[:8] == ["0", "0.250", "-", "-", "-", "-", "50.0", "nan"]
    assert lines[2].split()[3:5] == ["90.0", "50.0"]  # greedy, and the mean of avg@4 over both sets


def test_a_terminal_gets_a_progress_bar_that_leaves_whole_lines_behind():
    script = (
        "from dgpo_jax.metrics import *\n"
        "table = ConsoleTable()\n"
        "with progress('outer', total=None), progress('sampling', total=2) as advance:\n"
        "    advance(); table.show(7, {'reward/mean': 0.125}); advance()\n"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "200"}
    subprocess.run([sys.executable, "-c", script], stdout=child, env=environment, check=True)
    os.close(child)
    output = os.read(parent, 100_000).decode()
    os.close(parent)
    assert "sampling" in output
    assert "\x1b[" in output  # moves the cursor: it is a bar
    assert [line for line in output.splitlines() if "0.125" in line and " 7 " in line]


def full_row(iteration):
    return {
        "reward/mean": 0.1 * iteration, "rollout/response_length": 10.0, "policy/entropy": 1.0, "policy/kl": 0.0,
        "policy/ratio_max": 1.0, "optim/grad_norm": 1.0, "time/rollout": 2.0, "time/update": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [full_row(0)],
        [full_row(0), full_row(1)],
        [full_row(i) for i in range(5)],
        [full_row(i) | ({"eval/greedy": 0.5} if i % 10 == 0 else {}) for i in range(100)],
        [{"reward/mean": math.nan}, {"reward/mean": 1.0, "time/rollout": math.nan}],
        [{"optim/grad_norm": math.nan}],
        [{"unknown/thing": 1.0, "reward/mean": "text"}],
    ],
    ids=["none", "one", "two", "five", "hundred with evaluations", "gaps", "only NaN", "nothing known"],
)
def test_curves_are_drawn_from_whatever_there_is(tmp_path, rows):
    with MetricsWriter(tmp_path, console=False) as writer:
        for iteration, row in enumerate(rows):
            writer.write(iteration, row)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_accuracies_and_lengths_of_evaluations_are_not_drawn_in_one_panel():
    from dgpo_jax.plots import _present

    rows = [{"iteration": 0, "eval/avg@4": 0.5, "eval/avg@4_length": 30.0, "eval/greedy": 0.6, "eval/greedy_length": 20.0}]
    assert _present(PANELS[0].keys, rows) == ["eval/avg@4", "eval/greedy"]
    assert _present(PANELS[1].keys, rows) == ["eval/avg@4_length", "eval/greedy_length"]


def test_the_host_side_starts_without_jax_or_plotting():
    script = "import sys, dgpo_jax.metrics, dgpo_jax.plots; print({'jax', 'matplotlib', 'tensorboardX', 'rich'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "set()"
