"""The whole program on a run of seconds: what it leaves, that SIGKILL changes nothing, that devices change nothing."""

import collections
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compilations import compilations

from dgpo_jax import train
from dgpo_jax.build import abstract_state, build_parts
from dgpo_jax.checkpoint import Checkpoints, peek
from dgpo_jax.config import MeshConfig, load
from dgpo_jax.metrics import read_metrics
from dgpo_jax.recipe import resolve
from dgpo_jax.sharding import to_host

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_config.py'}"
CONFIG = load([TINY])
LAST = CONFIG.iterations
RUN_DEADLINE_S = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all processes of this test run, should it have several (pytest-xdist)."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "train"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def command():
    """The function (workdir, die_at) -> a process that trains on one device."""
    environment = os.environ | {"XLA_FLAGS": ""}

    def command(workdir, die_at=None):
        start = [str(ROOT / "tests/die_at.py"), die_at] if die_at else ["-m"]
        arguments = [sys.executable, *start, "dgpo_jax.train", TINY, f"--workdir={workdir}"]
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return command


@pytest.fixture(scope="module")
def undisturbed(folder, command):
    """The workdir of a run that nothing happened to."""
    workdir = folder / "undisturbed"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes first runs it
        if not (folder / "undisturbed.log").exists():
            process = command(workdir)
            output, _ = process.communicate(timeout=RUN_DEADLINE_S)
            assert process.returncode == 0, output
            (folder / "undisturbed.log").write_text(output)
    return workdir


def recorded(path):
    """The lines of a metrics.jsonl without what depends on the clock and the machine."""
    return [
        {key: value for key, value in json.loads(line).items() if key.split("/")[0] not in ("time", "speed", "memory")}
        for line in path.read_text().splitlines()
    ]


def test_a_run_leaves_all_its_files(undisturbed):
    assert [row["iteration"] for row in read_metrics(undisturbed / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert [row["update"] for row in read_metrics(undisturbed / "sft/metrics.jsonl")] == [*range(5, 65, 5)]
    assert names(undisturbed / "rollouts") == [f"iteration_{number:06d}.jsonl" for number in (1, 2, 3, 4, 5)]
    # Before the first iteration, every second, and after the last.
    assert names(undisturbed / "eval") == [f"iteration_{number:06d}.jsonl" for number in (0, 2, 4, 5)]
    kept = names(undisturbed / "checkpoints")
    assert kept[-2:] == ["iteration_000004", "iteration_000005"] and len(kept) <= 3  # keep is 2, and the best
    iteration, extra = peek(undisturbed / "checkpoints")
    assert (iteration, extra["skipped_in_a_row"], extra["position"], extra["unwritten"]) == (5, 0, 5 * 8, None)
    # No group waits to be learned from.
    assert names(undisturbed / "checkpoints/iteration_000005") == ["details.json", "manifest.json", "state"]
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(undisturbed.glob("tensorboard/events.out.tfevents.*"))) == 1
    assert len(list(undisturbed.glob("sft/tensorboard/events.out.tfevents.*"))) == 1
    recorded = json.loads((undisturbed / "config.json").read_text())
    assert recorded["model"]["width"] == 32
    # What was left open is recorded as what was run.
    assert (recorded["loss"]["clip_high"], recorded["rollout"]["dynamic_sampling"]) == (0.28, False)
    assert recorded["reward"]["incorrect"] == 0 and recorded["loss"]["aggregation_scale"] is None


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def texts(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_tells_its_story(undisturbed, folder):
    output = (folder / "undisturbed.log").read_text()
    for text in ("1 x cpu", "8 prompts x 4 samples = 32 responses", "dgpo (clip_low 0.2, clip_high 0.28,",
                 "grpo advantages, token-mean", "loss.clip_low 0.2, loss.clip_high 0.28,", "reward.incorrect 0.0", "first prompt, answer", "supervised warm start: 60",
                 "to compile, update: accumulate, score", "keeps programs in",
                 "curves.png", "metrics.jsonl", "checkpoints/"):  # fmt: skip
        assert text in output


def documented_keys():
    """Patterns of the keys in the first columns of docs/metrics.md, where a name without its group has that of the one before."""
    patterns = []
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        group = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            group = name.rpartition("/")[0] or group
            key = re.escape(name if "/" in name else f"{group}/{name}")
            patterns.append(re.sub("REGION|NAME", r"\\w+", key.replace("@k", r"@\d+")))
    return patterns


def test_every_metric_of_a_run_is_explained_in_the_docs(undisturbed):
    patterns = documented_keys()
    keys = {key for row in read_metrics(undisturbed / "metrics.jsonl") for key in row if key != "iteration"}
    assert [key for key in sorted(keys) if not any(re.fullmatch(pattern, key) for pattern in patterns)] == []
    assert len(keys) > 60  # it has seen them
    assert not any(re.fullmatch(pattern, "policy/unheard_of") for pattern in patterns)


def test_every_iteration_says_how_fast_it_was(undisturbed):
    first, *iterations = read_metrics(undisturbed / "metrics.jsonl")
    assert first["time/compile_ahead"] > 0
    for row in iterations:
        assert "time/compile_ahead" not in row
        assert row["speed/rollout_tokens_per_second_per_device"] == row["rollout/tokens"] / row["time/rollout"]  # one device
        assert row["speed/update_tokens_per_second_per_device"] == row["update/tokens"] / row["time/update"]
        assert row["speed/update_tflops_per_device"] == row["update/tflop"] / row["time/update"]
        assert "speed/update_mfu" not in row  # a CPU has no figure in the table
    learned = [row for row in iterations if row["policy/tokens"]]
    assert learned  # else some groups would have to differ more
    for row in learned:
        assert row["update/tokens"] > row["policy/tokens"]  # prompts are among them
        assert row["update/tflop"] > 0
        assert 0 < row["update/packing_efficiency"] <= 1


def test_every_response_is_written_with_its_verdict_and_reward(undisturbed):
    metrics = read_metrics(undisturbed / "metrics.jsonl")
    for iteration in range(1, LAST + 1):
        rows = texts(undisturbed / f"rollouts/iteration_{iteration:06d}.jsonl")
        assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 8
        assert {row["draw"] for row in rows} == {0} and metrics[iteration]["rollout/draws"] == 1
        assert metrics[iteration]["data/position"] == 8 * iteration
        assert all(row["reward"] == (row["verdict"] == "correct") for row in rows)
        # f32 and f64 means of 32 zeros and ones are both exact.
        assert np.mean([row["reward"] for row in rows]) == metrics[iteration]["reward/mean"]
        assert sum(row["tokens"] for row in rows) == metrics[iteration]["rollout/tokens"]
    rows = texts(undisturbed / "eval/iteration_000005.jsonl")
    greedy = [row["verdict"] == "correct" for row in rows if row["round"] == "eval/greedy"]
    assert len(rows) == 12 * (1 + 2) and len(greedy) == 12
    assert np.mean(greedy) == metrics[5]["eval/greedy"]


def test_the_warm_start_learns_and_updates_happen(undisturbed):
    # Otherwise the tests below would compare runs in which nothing happens.
    losses = [row["sft/loss"] for row in read_metrics(undisturbed / "sft/metrics.jsonl")]
    assert losses[-1] < 0.3 * losses[0]
    for row in read_metrics(undisturbed / "metrics.jsonl")[1:]:
        assert row["policy/tokens"] > 0 and row["optim/grad_norm"] > 0 and row["optim/skipped"] == 0
        assert row["policy/ratio_max"] > 1  # the second update meets weights that the first one moved


def test_the_first_ratio_is_one_and_the_sampler_agrees_with_the_trainer(undisturbed):
    for row in read_metrics(undisturbed / "metrics.jsonl")[1:]:
        # Nothing where no group of the first update had an advantage.
        assert row.get("policy/first_ratio_error", 0.0) < 1e-5
        assert 0 < row["gap/mean"] <= row["gap/max"] < 1e-4


def test_all_programs_are_compiled_ahead_of_the_first_iteration(undisturbed):
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert rows[0]["time/compile_ahead"] > 0
    assert [row["time/compile"] for row in rows] == [0.0] * (1 + LAST)


# (what the process is about to do when it dies, the file); random moments, in tests/test_chaos.py, rarely meet these
MOMENTS = [
    ("to finish a checkpoint, whose arrays are there", "*/run/checkpoints/iteration_000004/manifest.json.partial"),
    ("to start the last checkpoint, all metrics written", "*/run/checkpoints/iteration_000005/details.json"),
]


def test_a_run_killed_amid_a_save_and_just_before_one_ends_as_if_it_had_not_been(undisturbed, command, tmp_path):
    workdir = tmp_path / "run"
    for _, pattern in MOMENTS:
        process = command(workdir, die_at=pattern)
        output, _ = process.communicate(timeout=RUN_DEADLINE_S)
        assert process.returncode == -signal.SIGKILL, output
        if "manifest" in pattern:
            assert peek(workdir / "checkpoints")[0] < 4  # the torn one does not count
    process = command(workdir)
    output, _ = process.communicate(timeout=RUN_DEADLINE_S)
    assert process.returncode == 0 and "going on after iteration 4 of 5" in output, output

    for name in ("metrics.jsonl", "sft/metrics.jsonl"):
        assert recorded(workdir / name) == recorded(undisturbed / name)
    for name in ("rollouts", "eval"):
        assert names(workdir / name) == names(undisturbed / name)
        for path in (workdir / name).iterdir():
            assert path.read_bytes() == (undisturbed / name / path.name).read_bytes()
    assert_same_state(workdir, undisturbed)


def assert_same_state(workdir, other):
    """Weights, moments and the count of updates, to the bit."""
    target = abstract_state(build_parts(CONFIG))
    states = []
    for folder in (workdir, other):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            restored = checkpoints.restore(target)
        assert restored.iteration == LAST and restored.host_arrays == {}
        states.append(to_host(restored.state))
    assert states[0].update == 5 * 2
    np.testing.assert_equal(states[0], states[1])


def test_a_finished_run_started_again_computes_nothing(undisturbed, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(train, "build_programs", None)  # not even built
    for config in (CONFIG, resolve(CONFIG)):  # given the published values, it is the same run
        last = train.train(config, workdir)
        assert "nothing to do: all 5 iterations" in capsys.readouterr().out
        assert (workdir / "metrics.jsonl").read_bytes() == before
        assert last["iteration"] == 5


@pytest.fixture
def compiled():
    with compilations() as names:
        yield names


MESHES = {"data 8": MeshConfig(8, 1, 1), "fsdp 4 x tensor 2": MeshConfig(1, 4, 2)}
# Counts of rows that follow from the devices, and differences that are rounding themselves.
OF_THE_MESH = ("update/microbatches", "update/packing_efficiency", "update/imbalance", "rollout/slots_live", "gap/mean", "gap/max", "policy/first_ratio_error")


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_go_on_with_a_run_of_one_and_do_the_same_with_programs_compiled_once(
    mesh, undisturbed, tmp_path, compiled
):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/iteration_000005")
    # From iteration 4 and one further than before: the fifth has another to be compared with.
    train.train(replace(CONFIG, mesh=mesh, iterations=6), workdir)

    rows = recorded(workdir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[:5] == recorded(undisturbed / "metrics.jsonl")[:5]
    name = "rollouts/iteration_000005.jsonl"
    assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()
    expected = {key: value for key, value in recorded(undisturbed / "metrics.jsonl")[5].items() if not key.startswith("eval/")}
    assert rows[5].keys() == expected.keys()
    # Ratios lie close to the edges at 0.99 and 1.01: rounding may put one in a thousand across.
    assert rows[5].pop("policy/ratio_histogram") == pytest.approx(expected.pop("policy/ratio_histogram"), abs=0.01)
    for key in expected.keys() - set(OF_THE_MESH):
        assert rows[5][key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key
    assert rows[5]["gap/max"] < 1e-4 and rows[5]["policy/first_ratio_error"] < 1e-5

    # Ahead or when first called, but never twice: training, greedy and avg@k have a sampler each.
    expected = dict.fromkeys(("score", "complete", "zero", "accumulate", "norm", "apply"), 1) | dict.fromkeys(("prefill", "insert", "decode"), 3)
    counts = collections.Counter(compiled)
    assert {name: counts[name] for name in expected} == expected, counts
