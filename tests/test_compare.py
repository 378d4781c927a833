"""The comparison of methods: how it is asked for, what the numbers are, and that it survives crashes and kills."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dgpo_jax import compare, processes
from dgpo_jax.comparison import (
    Result,
    make_table,
    mean_and_error,
    paired_differences,
    read_result,
    series,
    summarise,
    to_csv,
)
from dgpo_jax.comparison_plan import parse_plan
from dgpo_jax.comparison_plots import PANELS, Weights, _draw, mean_curve, plot_comparison, plot_weights
from dgpo_jax.config import LossConfig
from dgpo_jax.files import alone_in
from dgpo_jax.methods import gradient_weights, parse_methods, trust_region
from dgpo_jax.metrics import read_metrics
from dgpo_jax.processes import Job, core_shares, run_all, why_failed

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_config.py'}"
DEADLINE_S = 600
PNG = b"\x89PNG"


# How methods are written


def test_methods_are_words_with_settings_in_parentheses():
    words = parse_methods("grpo, dgpo,dgpo(n=2, m=2),grpo(clip_high=0.3)")
    assert [word.label for word in words] == ["grpo", "dgpo", "dgpo(n=2,m=2)", "grpo(clip_high=0.3)"]
    assert words[1].arguments() == ["--config.loss.method=dgpo"]
    assert words[2].arguments() == ["--config.loss.method=dgpo", "--config.loss.n=2", "--config.loss.m=2"]


@pytest.mark.parametrize("text, complaint", [
    ("", "is not a method's name"),
    ("grpo,", "is not a method's name"),
    ("grpo dgpo", "choose one of"),  # spaces do not count, and grpodgpo is not a method
    ("ppo", "loss.method is 'ppo', which is not a method; choose one of"),
    ("dgpo(n=2", "is not a method's name"),
    ("dgpo(n=2))", "not of the form name=value"),
    ("dgpo()", "not of the form name=value"),
    ("dgpo(n)", "'n' is not of the form name=value"),
    ("dgpo(n=2,)", "'' is not of the form name=value"),
    ("dgpo(n=../..)", "not of the form name=value"),  # the label is a folder's name
    ("dgpo(steepness=2)", "'steepness' is not a setting of the loss; dgpo has clip_low, clip_high, n, m"),
    ("dgpo(method=grpo)", "'method' is not a setting of the loss"),
    ("grpo(n=2)", "grpo does not read n"),  # two such runs would be the same
    ("dgpo(n=1,n=2)", "gives n twice"),
    ("grpo,dgpo,grpo", "has 'grpo' twice"),
])  # fmt: skip
def test_a_method_that_is_not_written_well_is_refused(text, complaint):
    with pytest.raises(ValueError) as refusal:
        parse_methods(text)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("arguments, complaint", [
    (["--seeds=0,a"], "--seeds is '0,a', but seeds are whole numbers"),
    (["--seeds=-1"], "whole numbers"),
    (["--seeds=1,1"], "a seed twice"),
    (["--seeds=3000000000"], "seed"),
    (["--methods=ppo"], "choose one of"),
    (["--methods=dgpo(n=few)"], "few"),  # the value is refused as train does
    (["--methods=dgpo(m=0.5)"], "loss.m"),
    (["--methods=grpo,dgpo(dual_clip=1.25)"], "loss.dual_clip is 1.25"),  # inside DGPO's published region
    (["--methods=grpo,gspo", "--config.correction.weights=token"], "correction is"),  # GRPO alone could be corrected so
    (["--config.reward.correct=0"], "reward.incorrect is 0.0"),
    (["--jobs=0"], "--jobs is 0"),
    (["--config.seed=1"], "--config.seed is given, but runs differ in it; use --seeds"),
    (["--config.loss.method", "grpo"], "use --methods"),
    (["--config.iterations=0"], "iterations is 0"),
    (["--config.lots=1"], "lots"),
    (["--report-only", "--workdir=nowhere"], "no comparison in nowhere"),
])  # fmt: skip
def test_a_wrong_command_line_ends_before_anything_has_run(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_plan([TINY, "--methods=grpo", "--seeds=0", *arguments])
    assert exit.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_plan_holds_what_train_will_read():
    plan = parse_plan([TINY, "--methods=grpo,dgpo(m=3)", "--seeds=2,0", "--config.update.updates=4", "--workdir=w"])
    assert [config.loss.method for config in plan.configs] == ["grpo", "dgpo"] and plan.configs[1].loss.m == 3
    assert all(config.update.updates == 4 for config in plan.configs)
    # With what each method was published with.
    assert [config.loss.clip_high for config in plan.configs] == [0.2, 0.28]
    assert [config.reward.incorrect for config in plan.configs] == [0, 0]
    assert plan.arguments == [TINY, "--config.update.updates=4"]
    assert [str(run.workdir) for run in plan.runs()] == [
        "w/grpo/seed_2", "w/dgpo(m=3)/seed_2", "w/grpo/seed_0", "w/dgpo(m=3)/seed_0",
    ]  # fmt: skip


def test_settings_in_which_the_runs_are_not_the_same_are_found():
    assert parse_plan([TINY, "--methods=grpo,dgpo,dgpo(n=2),dapo", "--seeds=0,1"]).differences() == [
        "loss.clip_high: 0.2 for grpo; 0.28 for dgpo, dgpo(n=2), dapo",
        "loss.n: 1.0 for dgpo; 2.0 for dgpo(n=2)",  # the others do not read it; m is 2 for both
        "reward.incorrect: 0.0 for grpo, dgpo, dgpo(n=2); -1.0 for dapo",
        "reward.overlong_buffer: 0 for grpo, dgpo, dgpo(n=2); 2 for dapo",  # a fifth of 12
        "rollout.dynamic_sampling: False for grpo, dgpo, dgpo(n=2); True for dapo",
    ]


@pytest.mark.parametrize("arguments", [
    ["--methods=grpo"],
    ["--methods=dgpo,gppo"],  # seeds and methods differ, but no setting that both read
    ["--methods=grpo,dapo", "--config.loss.clip_high=0.3", "--config.reward.incorrect=0", "--config.reward.overlong_buffer=0",
     "--config.rollout.dynamic_sampling=False"],  # given for all, it is the same for all
])  # fmt: skip
def test_runs_that_differ_in_nothing_but_the_rule_have_no_differences(arguments):
    assert parse_plan([TINY, "--seeds=0,1", *arguments]).differences() == []


# Statistics


def test_mean_and_standard_error():
    # Deviations -2, 0, 2: variance 8 / 2 = 4, over 3 seeds.
    assert mean_and_error([1.0, 3.0, 5.0]) == (3.0, pytest.approx(math.sqrt(4 / 3)))
    assert mean_and_error([0.5]) == (0.5, None)


def test_differences_are_of_seeds_that_both_have():
    assert paired_differences({0: 5.0, 1: 7.0, 3: 1.0}, {1: 4.0, 0: 4.0, 2: 9.0}) == [1.0, 3.0]


def test_a_series_skips_what_is_missing_and_takes_the_first_key_that_the_run_has():
    rows = [{"iteration": 0, "a": 1.0}, {"iteration": 1, "b": 2.0, "eval/x/avg@4": 0.2, "eval/y/avg@4": 0.4},
            {"iteration": 2, "b": math.nan, "eval/x/avg@4_length": 9.0}]  # fmt: skip
    assert series(rows, "b|a") == [(1, 2.0)]
    assert series(rows, "c|a") == [(0, 1.0)]
    assert series(rows, "eval/*avg@*[0-9]") == [(1, pytest.approx(0.3))]
    assert series(rows, "c") == []


def a_run(label, seed, averages, finished=True, failure="", **more):
    """A run that is evaluated at each iteration."""
    rows = [
        {"iteration": number, "eval/greedy": average + 0.1, "eval/avg@4": average}
        | ({"policy/ratio_max": 2.0 + number, "policy/ratio_min": 0.5, "time/iteration": 3.0} if number else {})
        for number, average in enumerate(averages)
    ]
    rows[-1] |= more
    return Result(label, seed, rows, finished, failure)


def test_the_measures_of_a_run():
    rows = [
        {"iteration": 0, "eval/greedy": 0.1, "eval/avg@8": 0.3, "eval/avg@8_length": 7.0},
        {"iteration": 1, "policy/entropy": 9.0, "rollout/entropy": 0.5, "policy/ratio_max": 3.0, "optim/grad_norm": 1.0,
         "optim/grad_norm_max": 4.0, "rollout/responses": 32.0, "time/iteration": 2.0},
        {"iteration": 2, "eval/greedy": 0.75, "eval/avg@8": 0.5, "policy/ratio_max": math.nan, "time/iteration": 1.5},
        {"iteration": 3, "rollout/entropy": 0.25, "rollout/responses": 64.0, "eval/greedy": 0.5, "eval/avg@8": 0.25},
    ]  # fmt: skip
    assert summarise(rows) == {
        "greedy": 0.5, "avg": 0.25, "mean_avg": 0.375, "best_avg": 0.5, "drop": 0.25, "entropy": 0.25, "ratio_max": 3.0,
        "grad_norm_max": 4.0, "responses": 96.0, "seconds": 3.5,
    }  # fmt: skip
    assert set(summarise([]).values()) == {None}


@pytest.mark.parametrize("averages, best, drop", [
    ([0.9, 0.5, 0.25], 0.5, 0.25),  # what the run started with is not its own
    ([0.9, 0.25, 0.5], 0.5, 0.0),
    ([0.25, 0.5], 0.5, 0.0),
    ([0.9], None, None),  # nothing but the start
])  # fmt: skip
def test_the_best_and_the_drop_are_of_evaluations_after_the_start(averages, best, drop):
    summary = summarise([{"iteration": number, "eval/avg@8": value} for number, value in enumerate(averages)])
    assert (summary["best_avg"], summary["drop"], summary["avg"]) == (best, drop, averages[-1])


RESULTS = [
    a_run("grpo", 0, [0.2, 0.5]),
    a_run("dgpo(n=2)", 0, [0.2, 0.6]),
    a_run("grpo", 1, [0.2, 0.5, 0.4]),
    a_run("dgpo(n=2)", 1, [0.2, 0.7]),
    a_run("grpo", 2, [0.2, 0.9], finished=False, failure="12 updates in a row"),
    a_run("dgpo(n=2)", 2, [0.2, 0.5]),
    a_run("reinforce", 0, [0.25, 0.125]),
    Result("reinforce", 1, [], finished=False),
]


def test_the_table_has_means_errors_differences_and_who_is_missing():
    lines = make_table(RESULTS, "tiny").splitlines()
    assert lines[0] == "# tiny"
    header, _, grpo, dgpo, reinforce = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7])
    table = {row[0]: dict(zip(header, row, strict=True)) for row in (grpo, dgpo, reinforce)}
    assert [row["finished"] for row in table.values()] == ["2 of 3", "3 of 3", "1 of 2"]
    # 50 and 40: deviations 5, variance 50, over 2 seeds. The run that failed at 90 does not count.
    assert table["grpo"]["avg@4 %"] == "45.0 ± 5.0"
    assert table["grpo"]["greedy %"] == "55.0 ± 5.0"
    assert table["grpo"]["best avg@4 %"] == "50.0 ± 0.0"
    assert table["grpo"]["drop"] == "5.0 ± 5.0"
    assert table["grpo"]["avg@4 - grpo"] == "-"
    # 60 - 50 and 70 - 40 of seeds 0 and 1: mean 20, variance 200, over 2.
    assert table["dgpo(n=2)"]["avg@4 - grpo"] == "+20.0 ± 10.0"
    # Means after the start: 60 - 50, and 70 - 45.
    assert table["dgpo(n=2)"]["mean - grpo"] == "+17.5 ± 7.5"
    assert table["grpo"]["mean avg@4 %"] == "47.5 ± 2.5"
    assert table["reinforce"]["avg@4 %"] == "12.5"  # a single seed has no error
    assert table["reinforce"]["best avg@4 %"] == "12.5" and table["reinforce"]["drop"] == "0.0"  # 25 was the start
    assert table["reinforce"]["avg@4 - grpo"] == "-37.5"
    assert table["reinforce"]["responses"] == "-"
    assert "- grpo seed 2 failed after iteration 1: 12 updates in a row" in lines
    assert "- reinforce seed 1 is not finished, it is before the first iteration" in lines
    assert len({len(line) for line in lines[2:7]}) == 1  # aligned


def test_the_table_names_the_settings_in_which_methods_differ():
    table = make_table(RESULTS, "tiny", ["loss.n: 1 for a; 2 for b", "seed: 0 for a; 1 for b"])
    assert "same but for:\n\n- loss.n: 1 for a; 2 for b\n- seed: 0 for a; 1 for b\n\nNot in the means" in table
    assert "same but for" not in make_table(RESULTS, "tiny")


def test_the_csv_has_a_line_per_run_with_all_digits():
    rows = list(csv.DictReader(io.StringIO(to_csv(RESULTS))))
    assert [(row["method"], row["seed"], row["status"]) for row in rows[3:5]] == [
        ("dgpo(n=2)", "1", "finished"), ("grpo", "2", "failed"),
    ]  # fmt: skip
    assert float(rows[4]["avg"]) == 0.9 and rows[4]["failure"] == "12 updates in a row" and rows[4]["responses"] == ""
    assert rows[7]["status"] == "unfinished"


# Figures

RATIOS = np.array([0.25, 0.5, 1.0, 1.2, 2.0, 4.0, 64.0])


def test_the_weight_of_grpo_is_zero_where_a_token_leaves_the_region():
    loss = LossConfig(method="grpo", clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(gradient_weights(loss, RATIOS, 1.0), [0.25, 0.5, 1, 1.2, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(gradient_weights(loss, RATIOS, -1.0), [0, 0, 1, 1.2, 2, 4, 64], rtol=1e-5)


def test_the_weight_of_dgpo_is_a_root_above_the_region_and_a_square_below():
    loss = LossConfig(method="dgpo", clip_low=0.2, clip_high=0.28, n=1.0, m=2.0)
    # r^(1 - 1/m) * high^(1/m), and r^(n + 1) / low^n
    above, below = np.sqrt(RATIOS[4:] * 1.28), RATIOS[:2] ** 2 / 0.8
    np.testing.assert_allclose(gradient_weights(loss, RATIOS, 1.0), [0.25, 0.5, 1, 1.2, *above], rtol=1e-5)
    np.testing.assert_allclose(gradient_weights(loss, RATIOS, -1.0), [*below, 1, 1.2, 2, 4, 64], rtol=1e-5)


def test_every_method_weighs_a_token_by_one_where_the_ratio_is_one():
    from dgpo_jax.rl.losses import METHODS

    for method in METHODS:
        for advantage in (1.0, -1.0):
            weights = gradient_weights(LossConfig(method=method), RATIOS, advantage)
            assert weights[2] == pytest.approx(1.0, rel=1e-5), method
            assert (weights >= 0).all() and np.isfinite(weights).all(), method


@pytest.mark.parametrize("method, settings, expected", [
    ("dgpo", {}, (0.8, 1.28)),
    ("grpo", {"clip_low": 0.1}, (0.9, 1.2)),
    ("gmpo", {}, (math.exp(-0.4), math.exp(0.4))),  # whose bounds are on the log-ratio
    ("gmpo", {"clip_low": 2.0}, (math.exp(-2), math.exp(0.4))),
    ("cispo_one_sided", {}, (0.0, 1.2)),
    ("sapo", {}, None),
    ("reinforce", {}, None),
])  # fmt: skip
def test_the_trust_region_is_that_of_the_ratio(method, settings, expected):
    assert trust_region(LossConfig(method=method, **settings)) == pytest.approx(expected)


def test_a_curve_is_the_mean_over_runs_with_an_error_to_both_sides():
    runs = [{0: 1.0, 5: 2.0}, {0: 3.0}]
    curve = mean_curve(runs, log=False, smooth=False)
    assert (curve.iterations, curve.mean) == ([0, 5], [2.0, 2.0])
    assert curve.low == [1.0, 2.0] and curve.high == [3.0, 2.0]  # standard deviation sqrt(2), over sqrt(2)
    assert mean_curve([{1: 1.0}, {1: 100.0}], log=True, smooth=False).mean == [pytest.approx(10.0)]
    assert mean_curve([], log=False, smooth=True).iterations == []


def test_an_iteration_without_a_gradient_is_left_out_of_the_gradient_norm():
    norms = [{"iteration": number, "optim/grad_norm_max": value} for number, value in enumerate([0.1, 0.0, 10.0, 0.0])]
    axes = Figure().subplots()
    _draw(axes, PANELS["grad_norm"][0], [Result("grpo", 0, norms, finished=True)], ["grpo"])
    assert axes.get_yscale() == "log"  # which a 0 would have forbidden
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 2])


@pytest.mark.parametrize(
    "results", [RESULTS, RESULTS[:1], [Result("grpo", 0, [], finished=False)]], ids=["several", "one", "nothing yet"]
)
def test_figures_are_drawn_from_whatever_there_is(results, tmp_path):
    paths = plot_comparison(results, tmp_path, "tiny")
    assert {path.name for path in paths} == {
        "accuracy.png",
        "entropy.png",
        "grad_norm.png",
        "ratios.png",
        "overview.png",
    }
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_the_figure_of_weights_is_drawn(tmp_path):
    weights = [
        Weights("grpo", RATIOS * (RATIOS < 1.28), RATIOS, (0.8, 1.28)),
        Weights("flat", RATIOS**0, RATIOS**0, None),
        Weights("no lower bound", RATIOS, RATIOS, (-1.5, 1.28)),  # a clip_low of 2.5
    ]
    assert plot_weights(RATIOS, weights, tmp_path / "weights.png").read_bytes().startswith(PNG)


# Processes


def python(program, log, about=None):
    return Job([sys.executable, "-c", program], log, about)


def test_jobs_run_side_by_side_and_tell_how_they_ended(tmp_path):
    # Each waits for the other's file, so neither could end alone.
    program = (
        "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        python(program.format(a, b), tmp_path / "log", "a"),
        python(program.format(b, a), tmp_path / "log", "b"),
        python("import sys; sys.exit('no luck')", tmp_path / "c/log", "c"),
        python("import os; os.kill(os.getpid(), 9)", tmp_path / "d/log", "d"),
        python("raise ValueError('wrong')", tmp_path / "e/log", "e"),
        python("print('error: too hot\\nDGPO_JAX_TRACEBACK=1 shows where'); exit(1)", tmp_path / "f/log", "f"),
    ]
    ended, reasons = {}, {}

    def note(job, code, seconds):
        ended[job.about] = code
        reasons[job.about] = why_failed(job, code) if code else ""

    run_all(jobs, at_once=2, ended=note)
    assert ended == {"a": 0, "b": 0, "c": 1, "d": -signal.SIGKILL, "e": 1, "f": 1}
    assert reasons["c"] == "no luck" and reasons["d"] == "killed by SIGKILL"
    assert reasons["e"] == "ValueError: wrong" and reasons["f"] == "too hot"


def test_the_reason_is_that_of_the_last_attempt(tmp_path):
    jobs = [python("exit('first')", tmp_path / "log"), python("exit(3)", tmp_path / "log")]
    reasons = []
    run_all(jobs, at_once=1, ended=lambda job, code, _: reasons.append(why_failed(job, code)))
    assert reasons == ["first", "exit code 3, no output"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_jobs_at_a_time_have_equal_shares_of_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 6})
    assert core_shares(2) == [[0, 2], [3, 5]]
    assert core_shares(1) == [[]]
    assert core_shares(6) == [[0], [2], [3], [5], [6], [0]]
    monkeypatch.undo()
    job = python("import os; print(len(os.sched_getaffinity(0)))", tmp_path / "log")
    run_all([job], at_once=1000, ended=lambda *_: None)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "1"


def marked(mark):
    """Processes with MARK=mark in their environment, which children inherit; zombies have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(number, tmp_path):
    program = (
        "import signal, sys, pathlib\nfrom dgpo_jax.processes import *\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "jobs = [Job(['sleep', '1000'], pathlib.Path(sys.argv[1]) / name) for name in 'abc']\n"
        "run_all(jobs, 2, print)"
    )
    environment = os.environ | {"MARK": str(tmp_path)}
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(marked(tmp_path)) == 3)
    parent.send_signal(number)
    assert parent.wait(timeout=processes.GRACE_S) != 0
    wait_until(lambda: not marked(tmp_path))


# The story, with programs that only pretend to train

PRETENDER = """
import json, os, pathlib, sys
from dgpo_jax.manifest import write_manifest
workdir, method, sft = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "sft"
with open(workdir.parent.parent / "started", "a") as file:
    print(workdir.parent.name, workdir.name, sft, file=file)
if method in os.environ.get("CRASH", "").split():
    sys.exit("error: it was not to be")
def checkpoint(iteration):
    folder = workdir / f"checkpoints/iteration_{iteration:06d}"
    folder.mkdir(parents=True)
    (folder / "details.json").write_text(json.dumps({"iteration": iteration, "extra": {}}))
    write_manifest(folder)
if sft:
    checkpoint(0)
    (workdir / "sft").mkdir()
    (workdir / "sft/weights").write_text(workdir.name)
else:
    assert (workdir / "sft/weights").read_text() == workdir.name
    rows = [{"iteration": i, "eval/greedy": 0.5, "eval/avg@2": 0.25 * i} for i in range(3)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    checkpoint(2)
"""


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The function (methods, more...) -> (results, what was started)."""

    def command(story, plan, workdir, arguments):
        method = next((word.split("=")[1] for word in arguments if "method" in word), "warm_start")
        return [sys.executable, "-c", PRETENDER, str(workdir), method, story]

    monkeypatch.setattr(compare, "command", command)
    monkeypatch.setattr(compare, "plot_comparison", lambda *_: [])  # takes seconds, and has tests of its own
    monkeypatch.setattr(compare, "plot_weights", lambda *_: "weights.png")
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "comparison"

    def run(methods, *more):
        (workdir / "started").unlink(missing_ok=True)
        plan = parse_plan(
            [
                TINY,
                f"--methods={methods}",
                "--seeds=0,1",
                "--jobs=2",
                f"--workdir={workdir}",
                "--config.iterations=2",
                *more,
            ]
        )
        results = compare.compare(plan)
        started = (workdir / "started").read_text().splitlines() if (workdir / "started").exists() else []
        return {(result.label, result.seed): result for result in results}, sorted(started)

    run.workdir = workdir
    return run


def test_a_run_that_crashes_is_written_down_and_tried_again_and_the_others_go_on(pretended, monkeypatch, capsys):
    monkeypatch.setenv("CRASH", "grpo")
    results, started = pretended("grpo,dgpo")
    assert len(started) == 2 + 4  # warm starts and runs
    assert [result.finished for result in results.values()] == [False, True, False, True]
    assert results["grpo", 0].failure == "it was not to be"
    output = capsys.readouterr().out
    assert "[4/4]" in output and "grpo seed 1: FAILED, it was not to be" in output
    assert (
        "- grpo seed 1 failed before the first iteration: it was not to be"
        in (pretended.workdir / "table.md").read_text()
    )
    assert "- loss.clip_high: 0.2 for grpo; 0.28 for dgpo\n" in (pretended.workdir / "table.md").read_text()

    monkeypatch.delenv("CRASH")
    results, started = pretended("grpo,dgpo")
    assert started == ["grpo seed_0 False", "grpo seed_1 False"]
    assert all(result.finished and not result.failure for result in results.values())
    assert "[2/4] finished before" in capsys.readouterr().out

    # One more method, with the same starts; then nothing more to do.
    assert pretended("grpo,dgpo,dgpo(n=2)")[1] == ["dgpo(n=2) seed_0 False", "dgpo(n=2) seed_1 False"]
    before = (pretended.workdir / "table.md").read_text()
    assert pretended("grpo,dgpo,dgpo(n=2)")[1] == []
    (pretended.workdir / "table.md").unlink()
    assert pretended("grpo,dgpo,dgpo(n=2)", "--report-only")[1] == []
    assert (pretended.workdir / "table.md").read_text() == before


def test_without_its_warm_start_a_run_is_not_started(pretended, monkeypatch):
    monkeypatch.setenv("CRASH", "warm_start")
    results, started = pretended("grpo")
    assert started == ["warm_start seed_0 True", "warm_start seed_1 True"]
    assert results["grpo", 0].failure == "warm start: it was not to be"
    monkeypatch.delenv("CRASH")
    assert all(result.finished for result in pretended("grpo")[0].values())


def test_other_settings_and_other_companies_are_refused(pretended):
    pretended("grpo")
    with pytest.raises(ValueError, match=r"update\.updates was 2 and is 4"):
        pretended("grpo", "--config.update.updates=4")
    with alone_in(pretended.workdir), pytest.raises(ValueError, match="another process"):
        pretended("grpo")


def test_half_a_copy_of_a_warm_start_is_made_anew(pretended):
    partial = pretended.workdir / "grpo/seed_0.partial"
    (partial / "sft").mkdir(parents=True)
    (partial / "sft/weights").write_text("half")
    assert pretended("grpo")[0]["grpo", 0].finished  # it checks the weights
    assert not partial.exists()


# The whole program


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_comparison_that_was_killed_leaves_no_child_and_goes_on(tmp_path, capsys):
    workdir = tmp_path / "comparison"
    environment = os.environ | {"XLA_FLAGS": "", "MARK": str(tmp_path)}  # one device
    command = [
        sys.executable, "-m", "dgpo_jax.compare", TINY, "--methods=grpo,dgpo(n=2,m=2)", "--seeds=3", "--jobs=2",
        f"--workdir={workdir}", "--config.iterations=2", "--config.checkpoint.every=1",
        "--config.model.layers=1", "--config.sft.updates=20",
    ]  # fmt: skip

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = start()
    # Both train, and have just begun.
    wait_until(lambda: process.poll() is not None or len(list(workdir.glob("*/seed_3/metrics.jsonl"))) == 2)
    assert process.poll() is None, process.stdout.read()
    process.kill()
    wait_until(lambda: not marked(tmp_path))  # the checkers of answers included

    process = start()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert "[2/2]" in output and "warm start, seed" not in output  # it was done before
    assert "| dgpo(n=2,m=2) |   1 of 1 |" in output
    for name in ("table.md", "results.csv", "weights.png", "accuracy.png", "overview.png"):
        assert (workdir / name).stat().st_size > 0

    runs = [workdir / label / "seed_3" for label in ("grpo", "dgpo(n=2,m=2)")]
    grpo, dgpo = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert [row["iteration"] for row in grpo] == [row["iteration"] for row in dgpo] == [0, 1, 2]
    # The same weights, to the bit: the same evaluation, and the same first responses by the same log-probabilities.
    assert grpo[0]["eval/greedy"] == dgpo[0]["eval/greedy"] and grpo[0]["eval/avg@2"] == dgpo[0]["eval/avg@2"]
    first = [(run / "rollouts/iteration_000001.jsonl").read_bytes() for run in runs]
    assert first[0] == first[1]
    assert json.loads((runs[1] / "config.json").read_text())["loss"]["n"] == 2

    logs = [(run / "log.txt").read_bytes() for run in runs]
    compare.compare(parse_plan(command[3:]))
    assert "[2/2] finished before" in capsys.readouterr().out
    assert [(run / "log.txt").read_bytes() for run in runs] == logs


@pytest.mark.parametrize("line", ["{}", '{"iteration": "x"}', '{"iteration": 1, "time/clock": "x"}'])
def test_a_line_of_metrics_that_no_run_wrote_is_refused_with_its_file(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is .*, which no run has written; mend or delete"):
        read_result("grpo", 0, tmp_path, finished=True)
