"""Traces of named iterations, and the stopwatch whose parts they show."""

import gzip
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dgpo_jax.config import Config, fixed_settings, load, parse_iterations
from dgpo_jax.profiling import profiled
from dgpo_jax.session import Stopwatch


@pytest.mark.parametrize("text, expected", [
    ("", []),
    ("3", [3]),
    ("3,5-6", [3, 5, 6]),
    (" 3 , 5 - 6 ", [3, 5, 6]),
    ("7-7,2", [7, 2]),
])
def test_iterations_are_named_by_numbers_and_ranges(text, expected):
    assert [number for part in parse_iterations(text) for number in part] == expected


@pytest.mark.parametrize("text", ["0", "-3", "5-3", "3,,5", "3;5", "three", "3-", "1.5", "3,", "٣", "9" * 30])
def test_anything_else_is_refused_with_the_value_the_rule_and_the_fix(text):
    with pytest.raises(ValueError) as refusal:
        replace(Config(), profile=text)
    assert str(refusal.value) == (
        f"profile is {text!r}, but it names iterations, from 1 on and in order within a range;"
        " give numbers and ranges with commas between them, such as '3,5-6', or '' for none."
    )


@pytest.mark.parametrize("value, rule", [
    (-1.0, "it is a rate"),
    (float("nan"), "numbers are kept in 32 bits"),  # as of every setting
    (float("inf"), "numbers are kept in 32 bits"),
])  # fmt: skip
def test_a_peak_is_a_finite_rate(value, rule):
    with pytest.raises(ValueError, match=rf"peak_tflops is .*, but {rule}"):
        replace(Config(), peak_tflops=value)


def test_both_settings_may_change_when_a_run_goes_on():
    assert fixed_settings(replace(Config(), profile="3", peak_tflops=2.0)) == fixed_settings(Config())


def test_the_setting_is_given_on_the_command_line():
    assert load(["--config=configs/smoke.py", "--config.profile=3,5-6"]).profile == "3,5-6"


@jax.jit
def work(x):
    with jax.named_scope("a_scope"):
        return jnp.tanh(x @ x)


def test_only_a_named_iteration_is_traced_and_the_trace_shows_its_parts(tmp_path, capsys):
    config = replace(Config(), profile="2")
    x, results = jnp.ones((64, 64)), []
    with Stopwatch(show=lambda part: None) as stopwatch:
        for iteration in (1, 2, 3):
            with profiled(config, tmp_path, iteration), stopwatch("rollout"):
                results.append(jax.device_get(work(x)))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["iteration_000002"]
    (trace,) = tmp_path.glob("profile/iteration_000002/plugins/profile/*/*.trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"rollout", "iteration"} <= names
    assert any("work" in str(name) for name in names)  # the program itself
    assert (results[0] == results[1]).all()
    assert f"profile of iteration 2 in {tmp_path}/profile/iteration_000002" in capsys.readouterr().out


def test_a_trace_is_written_of_an_iteration_that_fails_too(tmp_path):
    with pytest.raises(ZeroDivisionError), profiled(replace(Config(), profile="1"), tmp_path, 1):
        raise ZeroDivisionError
    assert list(tmp_path.glob("profile/iteration_000001/plugins/profile/*/*.xplane.pb"))
    with profiled(replace(Config(), profile="2"), tmp_path, 2):  # tracing was stopped: it can start again
        pass


def test_the_stopwatch_counts_compilation_while_it_runs_and_no_longer():
    def compile_something(size):
        jax.jit(lambda x: x * 3 + size).lower(jnp.ones(size)).compile()

    with Stopwatch(show=lambda part: None) as stopwatch:
        with stopwatch("rollout"):
            compile_something(3)
        times = stopwatch.take()
        assert 0 < times["time/compile"] <= times["time/rollout"]
        assert stopwatch.take() == {"time/compile": 0.0}  # since the last call
        with stopwatch("update"):
            pass
        # What an interrupted iteration took before counts too, and nothing else that it had measured.
        earlier = {"time/rollout": 10.0, "time/update": 1.0, "time/compile": 3.0, "reward/mean": 0.5}
        times = stopwatch.take(earlier)
        assert times.pop("time/update") > 1.0 and times == {"time/rollout": 10.0, "time/compile": 3.0}
    compile_something(5)
    assert stopwatch.take() == {"time/compile": 0.0}  # its listener is gone
