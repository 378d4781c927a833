"""A run that is killed at random moments ends as one that was not; a long version is benchmarks/chaos.py.

Kills at moments that random ones rarely meet are in tests/test_train.py, stops in every mode in tests/test_resume.py.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # as it is for a script there

import chaos  # noqa: E402
from chaos import Clock, Kill, Survived  # noqa: E402
from same_runs import saved_places  # noqa: E402

from dgpo_jax.config import load  # noqa: E402
from dgpo_jax.metrics import read_metrics  # noqa: E402

TINY = str(ROOT / "tests/tiny_config.py")
SIGNALS = ["KILL", "TERM", "KILL", "INT", "KILL", "KILL"]


@pytest.fixture(scope="module")
def environment():
    """One device, and the compiled programs of all tests: a start is then a matter of seconds."""
    return os.environ | {"XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """Workdir and Clock of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "undisturbed"
    return workdir, chaos.run_undisturbed(TINY, workdir, environment)


def test_a_run_that_gets_signals_at_random_moments_ends_as_if_it_had_not(undisturbed, environment, tmp_path):
    whole, clock = undisturbed
    runs = chaos.survive(TINY, tmp_path, environment, SIGNALS, clock, seed=0)
    kills = [kill for run in runs for kill in run.kills]
    assert [kill.signal for kill in kills] == SIGNALS
    for run in runs:
        assert chaos.first_difference(run, whole, load([f"--config={TINY}"])) is None, kills
        assert [row["iteration"] for row in read_metrics(run.workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_an_undisturbed_run_says_when_what_was_done(undisturbed):
    workdir, clock = undisturbed
    assert 0 < clock.cold_start == clock.start < clock.done["sft", 60] < clock.done["", 0] < clock.done["", 5] < clock.total
    assert clock.reached("sft", 62) == clock.done["sft", 60] and clock.reached("sft", 4) == 0  # the first line is of update 5
    assert ("", 5) in set(saved_places(workdir)) and ("sft", 60) in set(saved_places(workdir))


def test_a_process_that_takes_a_signal_otherwise_than_it_should_ends_the_benchmark(tmp_path, monkeypatch):
    # A program that says it has started, and takes SIGTERM for the end of its work: exit code 3.
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print('supervised warm start: ', flush=True); time.sleep(60)"

    def start(config, workdir, environment):
        with open(f"{workdir}.log", "ab") as log:
            return chaos.subprocess.Popen([sys.executable, "-c", program], stdout=log)

    monkeypatch.setattr(chaos, "start_run", start)
    monkeypatch.setattr(chaos, "AT_START", 0.0)
    with pytest.raises(SystemExit, match=r"got SIGTERM .* in warm start after update 0 had exit code 3"):
        chaos.survive(TINY, tmp_path, os.environ, ["TERM"], Clock(0.1, 0.1, 1.0, {}), seed=0)


@pytest.mark.parametrize(
    "text, files, phase",
    [
        ("", [], "imports"),
        ("dgpo_jax: tiny in x\n", [], "reading settings and problems"),
        ("dgpo_jax: tiny in x\nto compile, update: a\n", [], "compilation"),
        ("to compile, update: a\ncompiled 2 programs in 1 s\n", [], "reading weights"),
        ("compiled 2 programs\nsupervised warm start: 60 updates\n", [], "warm start after update 0"),
        ("supervised warm start: 60\n   update     loss\n       20   3.8\n", [], "warm start after update 20"),
        ("compiled\ngoing on after iteration 0 of 5\n", [], "evaluation before iteration 1"),
        ("compiled\ngoing on after iteration 2 of 5\n", [], "rollout of iteration 3"),
        # The warm start's table came first; its number is not an iteration's.
        ("   update     loss\n       60   3.8\niteration   reward\n        0       -\n", [], "rollout of iteration 1"),
        ("\niteration   reward\n        2       -\n", ["rollouts/iteration_000003.jsonl"], "update of iteration 3"),
        ("\niteration   reward\n        3       -\n", ["rollouts/iteration_000004.jsonl"], "update or evaluation of iteration 4"),
        ("\niteration   reward\n        5       -\n", [], "end"),
        ("\niteration   reward\n        4       -\n", ["checkpoints/iteration_000004/details.json"], "rollout of iteration 5, amid the save of checkpoints/iteration_000004"),
    ],
)
def test_where_a_signal_fell_is_told_by_what_was_said_and_which_files_there_are(text, files, phase, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert chaos.name_phase(TINY, tmp_path, text, set()) == phase


def test_a_checkpoint_that_was_unfinished_before_is_not_taken_for_one_being_saved(tmp_path):
    folder = tmp_path / "checkpoints/iteration_000004"
    folder.mkdir(parents=True)
    before = chaos.unfinished(tmp_path)
    assert "save" not in chaos.name_phase(TINY, tmp_path, "supervised warm start: ", before)
    folder.rename(folder.with_name("iteration_000004.bad"))  # as a start does, and then saves anew
    folder.mkdir()
    assert "amid the save of checkpoints/iteration_000004" in chaos.name_phase(TINY, tmp_path, "supervised warm start: ", before)
    (folder / "manifest.json").touch()
    assert chaos.unfinished(tmp_path) == set()


def test_only_where_every_signal_was_a_kill_must_the_same_checkpoints_be_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(chaos, "differences", lambda *given: asked.append(given[-1]) or iter(()))
    for names in (["KILL", "KILL"], ["KILL", "TERM"]):
        chaos.first_difference(Survived(tmp_path, [Kill(name, 0.0, "") for name in names], 0), tmp_path, None)
    assert asked == [True, False]
    assert {name: int(number) for name, number in chaos.SIGNALS.items()} == {"KILL": signal.SIGKILL, "TERM": 15, "INT": 2}
