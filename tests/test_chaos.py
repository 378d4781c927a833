"""A run that is killed at random moments ends as one that was not; a long version is benchmarks/chaos.py.

Kills at moments that random ones rarely meet are in tests/test_train.py, stops in every mode in tests/test_resume.py.
"""

import collections
import os
import random
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # as it is for a script there

import chaos  # noqa: E402
import chaos_phases  # noqa: E402
from chaos import Kill, Moment, Survived  # noqa: E402
from chaos_phases import BETWEEN, PHASES, Place, look, unfinished, words_file  # noqa: E402

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
    """Workdir of a run that nothing happened to, and the seconds of its phases."""
    workdir = tmp_path_factory.mktemp("whole") / "undisturbed"
    return workdir, chaos.run_undisturbed(TINY, workdir, environment)


def test_a_run_that_gets_signals_at_random_moments_ends_as_if_it_had_not(undisturbed, environment, tmp_path):
    whole, seconds = undisturbed
    runs = chaos.survive(TINY, tmp_path, environment, chaos.draw_moments(seconds, SIGNALS, random.Random(0)))
    kills = [kill for run in runs for kill in run.kills]
    assert sorted(kill.signal for kill in kills) == sorted(SIGNALS)
    for run in runs:
        assert chaos.first_difference(run, whole, load([f"--config={TINY}"])) is None, kills
        assert [row["iteration"] for row in read_metrics(run.workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_an_undisturbed_run_tells_how_long_each_phase_was(undisturbed):
    _, seconds = undisturbed
    assert {place.phase for place in seconds} >= set(PHASES)
    found = collections.defaultdict(set)
    for place in seconds:
        found[place.phase].add(place.number)
    # Short as they are, one may fall between two looks.
    assert found["warm start"] <= set(range(61)) and len(found["warm start"]) > 20
    assert found["rollout"] <= {1, 2, 3, 4, 5} and found["update"] <= {1, 2, 3, 4, 5}
    assert found["evaluation"] <= {0, 2, 4, 5} and found["save"] <= {0, 2, 4, 5} and found["warm start's save"] <= {20, 40, 60}


def test_every_phase_gets_its_signals_however_short_it_is_and_they_come_in_the_order_of_the_run():
    lengths = {
        "imports": [1.0], "compilation": [10.0], "weights": [1.0], "reading": [1.0], "warm start": [5.0] * 60, "warm start's save": [0.1] * 3,
        "rollout": [0.1] * 5, "update": [0.1] * 5, "evaluation": [0.2] * 6, "save": [0.1] * 6,
    }  # fmt: skip
    seconds = {Place(phase, number): length for phase, some in lengths.items() for number, length in enumerate(some)} | {Place(BETWEEN, 0): 9.0}
    moments = chaos.draw_moments(seconds, ["KILL"] * 22, random.Random(0))
    assert len(moments) == 22
    assert sorted(collections.Counter(moment.place.phase for moment in moments).values()) == [2] * 8 + [3] * 2  # of 10 phases
    assert all(0 <= moment.seconds <= seconds[moment.place] / 2 for moment in moments)
    _, *others = [moment.seconds for moment in moments if moment.place.phase == "compilation"]
    assert all(other <= chaos.COMPILED_S for other in others)  # what was compiled before is found in the cache
    work = [moment.place for moment in moments if moment.place.phase not in chaos.ANYWHERE]
    parts = [PHASES[place.phase] for place in work]
    assert parts == sorted(parts) and set(parts) == {0, 1, 2}
    for part in (1, 2):
        numbers = [place.number for place in work if PHASES[place.phase] == part]
        assert numbers == sorted(numbers) and len(set(numbers)) > 2
    assert moments != chaos.draw_moments(seconds, ["KILL"] * 22, random.Random(1))
    firsts = {chaos.draw_moments(seconds, ["KILL"] * 20, random.Random(seed))[0].place.phase for seed in range(20)}
    assert firsts > {"compilation"}  # signals at a start go between any of the others
    # A run without a warm start has none of its signals.
    bare = {place: length for place, length in seconds.items() if "warm" not in place.phase}
    assert {moment.place.phase for moment in chaos.draw_moments(bare, ["KILL"] * 8, random.Random(0))} == {place.phase for place in bare} - {BETWEEN}


def pretend(program, monkeypatch):
    """Lets `program` be the run; it finds the path of the file that says what it is doing in `words`."""

    def start(config, workdir, environment):
        words_file(workdir).write_text("")
        with open(f"{workdir}.log", "ab") as log:
            return chaos.subprocess.Popen([sys.executable, "-c", f"words = {str(words_file(workdir))!r}\n{program}"], stdout=log)

    monkeypatch.setattr(chaos, "start_run", start)


def test_a_process_that_takes_a_signal_otherwise_than_it_should_ends_the_benchmark(tmp_path, monkeypatch):
    # A program that says it is amid its updates, and takes SIGTERM for the end of its work: exit code 3.
    pretend(
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); "
        "open(words, 'w').write('iteration 4, iteration, update'); time.sleep(60)", monkeypatch,
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"got SIGTERM .* in update 4 had exit code 3"):
        chaos.survive(TINY, tmp_path, os.environ, [Moment("TERM", Place("update", 3), 0.0)])


def test_a_process_that_does_not_come_to_the_phase_is_not_waited_for_without_end(tmp_path, monkeypatch):
    pretend("import time; open(words, 'w').write('iteration 2, iteration, update'); time.sleep(60)", monkeypatch)
    monkeypatch.setattr(chaos, "PATIENCE_S", 1)
    with pytest.raises(SystemExit, match="has not come to update 3 in 1 s"):
        chaos.survive(TINY, tmp_path, os.environ, [Moment("KILL", Place("update", 3), 0.0)])


@pytest.mark.parametrize(
    "words, place",
    [
        ("", "imports"),
        ("compiling 'update'; compiling 'samples decode 24'", "compilation"),
        ("after compiling 'update'", "compilation"),
        ("reading the checkpoint", "reading"),
        ("reading or making weights", "weights"),
        ("after reading or making weights", "reading"),
        ("after reading the checkpoint", "reading"),  # older lines of metrics are read
        ("warm start (update 30 of 60)", "warm start 30"),
        ("warm start (update 60 of 60), writing a checkpoint to /iteration 3, iteration, update", "warm start 60"),
        ("iteration 3, iteration, rollout, waiting for the devices", "rollout 3"),
        ("iteration 3, iteration, verify, checking answers (7 of 32 outstanding)", "rollout 3"),
        ("iteration 3, iteration", BETWEEN),
        ("iteration 12, iteration, update; finish", "update 12"),
        ("after iteration 12, iteration, update", BETWEEN),
        ("iteration 2, eval, waiting for the devices", "evaluation 2"),
        ("after iteration 2, eval", BETWEEN),
        ("writing a checkpoint to /eval/checkpoints", BETWEEN),
    ],
)
def test_where_a_signal_fell_is_told_by_what_the_run_says_it_is_doing(words, place, tmp_path):
    words_file(tmp_path).write_text(words.ljust(200))
    assert [str(found) for found in look(tmp_path, set())] == [place]


def test_a_run_says_what_it_is_doing_while_it_does_it_and_afterwards_that_it_has_done_it(tmp_path):
    workdir, module = tmp_path / "run", tmp_path / "works.py"
    module.write_text(
        "import sys, time; sys.path[0] = sys.argv[1]; from dgpo_jax import activity\n"
        "read, seen = lambda: open(sys.argv[2]).read().strip(), [None]\n"
        "def told():\n"
        "    limit = time.monotonic() + 20\n"
        "    while read() == seen[-1] and time.monotonic() < limit: time.sleep(0.01)\n"
        "    seen.append(read())\n"
        "    print(seen[-1])\n"
        "told()\nwith activity.doing('eval'): told()\ntold()\n"
        "with activity.doing('iteration 7'): told()\nwith activity.doing('eval'): told()\nwith activity.doing('x' * 300): told()"
    )
    words_file(workdir).write_text("")
    command = [sys.executable, chaos_phases.__file__, str(words_file(workdir)), "works", str(ROOT), str(words_file(workdir))]
    done = chaos.subprocess.run(command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == [
        "", "iteration 0, eval", "after iteration 0, eval", "iteration 7", "iteration 7, eval", "x" * chaos_phases.WIDTH
    ], done.stderr  # fmt: skip


def test_a_checkpoint_that_was_unfinished_before_is_not_taken_for_one_being_saved(tmp_path):
    words_file(tmp_path).write_text("iteration 5, iteration, rollout")
    folder = tmp_path / "checkpoints/iteration_000004"
    folder.mkdir(parents=True)
    (tmp_path / "sft/checkpoints/iteration_000020").mkdir(parents=True)
    before = unfinished(tmp_path)
    assert look(tmp_path, before) == [Place("rollout", 5)]
    assert look(tmp_path, set()) == [Place("rollout", 5), Place("save", 4), Place("warm start's save", 20)]
    folder.rename(folder.with_name("iteration_000004.bad"))  # as a start does, and then saves anew
    folder.mkdir()
    assert look(tmp_path, before) == [Place("rollout", 5), Place("save", 4)]
    assert str(Kill("KILL", 1.0, look(tmp_path, before))) == "rollout 5, amid the save 4"
    (folder / "manifest.json").touch()
    folder.with_name("iteration_000005.2").mkdir()  # a stop amid its updates had saved it before
    assert look(tmp_path, before) == [Place("rollout", 5), Place("save", 5)]


def test_only_where_every_signal_was_a_kill_must_the_same_checkpoints_be_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(chaos, "differences", lambda *given: asked.append(given[-1]) or iter(()))
    for names in (["KILL", "KILL"], ["KILL", "TERM"]):
        chaos.first_difference(Survived(tmp_path, [Kill(name, 0.0, []) for name in names], 0), tmp_path, None)
    assert asked == [True, False]
    assert {name: int(number) for name, number in chaos.SIGNALS.items()} == {"KILL": signal.SIGKILL, "TERM": 15, "INT": 2}
