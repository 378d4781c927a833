"""What a run says of its own metrics: when, how often, and what to look at."""

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax.config import Config, UpdateConfig
from dgpo_jax.health import SIGNS, Health
from dgpo_jax.metrics import MetricsWriter, read_metrics

CONFIG = get_config()
# A line in which nothing is wrong.
SOUND = {
    "reward/score": 0.4, "reward/groups_alike": 0.5, "reward/groups_all_right": 0.1, "rollout/entropy": 0.6,
    "rollout/response_length": 100.0, "rollout/truncated": 0.1, "gap/mean": 2e-7, "policy/first_ratio_error": 1e-6,
    "policy/clipped": 0.01, "optim/grad_norm_max": 1.0, "optim/skipped": 0.0, "verdict/timed_out": 0.0,
    "verdict/crashed": 0.0, "verdict/unparsable": 0.1, "policy/ratio_histogram": [0.5, 0.5],
}  # fmt: skip


def said(lines, config=CONFIG, dtype="float32"):
    """The names of the signs said at each of these lines; the first is iteration 1."""
    health = Health(config, dtype)
    return [names(health.warnings(iteration, SOUND | line)) for iteration, line in enumerate(lines, start=1)]


def names(messages):
    """What a message begins with tells which sign it is."""
    return [next(name for name, words in WORDS.items() if words in message) for message in messages]


WORDS = {
    "skipped_updates": "updates were skipped", "sampler_overflows": "of the sampler are not finite", "nothing_right": "no answer scored", "groups_alike": "within every group",
    "checker_fails": "the checker failed", "answers_unparsable": "cannot be read", "entropy_collapse": "entropy collapse",
    "length_explosion": "exploding length", "cut_off": "of responses are cut off", "sampler_gap": "sampler and trainer disagree",
    "first_ratio": "policy/first_ratio_error is", "gradient_explosion": "optim/grad_norm_max is", "mostly_clipped": "outside the clip region",
}  # fmt: skip

# Sign -> lines, and the iteration that says it.
CASES = {
    "skipped_updates": ([{}, {"optim/skipped": 1.0, "optim/grad_norm_max": math.nan}], 2),
    "sampler_overflows": ([{}, {"rollout/entropy": math.nan}], 2),
    "nothing_right": ([{"reward/score": 0.0, "reward/groups_alike": 1.0}] * 3, 3),  # and no word of groups alike, which follows
    "groups_alike": ([{"reward/groups_alike": 1.0}] * 3, 3),
    "checker_fails": ([{}, {"verdict/timed_out": 0.06, "verdict/crashed": 0.05}], 2),
    "answers_unparsable": ([{"verdict/unparsable": 0.51}], 1),
    "entropy_collapse": ([{}, {"rollout/entropy": 0.059}], 2),  # a tenth of 0.6
    "length_explosion": ([{}, {"rollout/response_length": 200.0, "rollout/truncated": 0.51}], 2),
    "cut_off": ([{"rollout/truncated": 0.51}], 1),
    "sampler_gap": ([{"gap/mean": 1.1e-3}], 1),
    "first_ratio": ([{"policy/first_ratio_error": 1.1e-3}], 1),
    "gradient_explosion": ([{}] * 5 + [{"optim/grad_norm_max": 101.0}], 6),
    "mostly_clipped": ([{"policy/clipped": 0.51}], 1),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_each_sign_is_said_where_it_begins_and_alone(sign):
    lines, when = CASES[sign]
    assert said(lines) == [[sign] if iteration == when else [] for iteration in range(1, len(lines) + 1)]


@pytest.mark.parametrize("lines", [
    [{}] * 3,
    [{}, {"rollout/entropy": 0.009, "reward/score": 0.95}],  # a problem that is solved has one answer
    [{"rollout/entropy": 0.061}, {"rollout/entropy": 0.0101}],  # a policy that never had much entropy has not lost it
    [{}, {"rollout/response_length": 250.0}],  # longer and longer, yet they end
    [{"reward/score": 0.0}, {"reward/score": 0.0}, {}, {"reward/score": 0.0}],  # not three in a row
    [{"reward/groups_alike": 1.0}, {}, {"reward/groups_alike": 1.0}, {"reward/groups_alike": 1.0}],
    [{}] * 4 + [{"optim/grad_norm_max": 101.0}],  # four norms are too few to call anything usual
    [{"optim/grad_norm_max": 0.0}] * 9 + [{"optim/grad_norm_max": 1.0}],  # nothing learned before: nothing to compare with
    [{"gap/mean": math.nan, "rollout/truncated": math.nan, "verdict/unparsable": math.nan}],
])  # fmt: skip
def test_nothing_is_said_where_nothing_is_wrong(lines):
    assert said(lines) == [[]] * len(lines)


def test_a_line_that_lacks_metrics_says_nothing_of_them():
    health = Health(CONFIG, "float32")
    assert health.warnings(0, {"eval/greedy": 0.0, "optim/skipped": 3.0}) == []  # before the first update
    assert health.warnings(1, {"policy/tokens": 0.0, "optim/skipped": 0.0}) == []


def test_a_sign_is_said_once_until_it_went_away():
    low, fine = {"policy/clipped": 0.9}, {}
    assert said([low, low, fine, low, low]) == [["mostly_clipped"], [], [], ["mostly_clipped"], []]


def test_the_usual_norm_is_the_median_of_the_last_twenty():
    def norms(*values):
        return [{"optim/grad_norm_max": value} for value in values]

    # Twenty of 10 push the first ones out: 150 is 15 times the usual, and 300 times the median of all.
    assert not any(said(norms(*[0.5] * 30, *[10.0] * 20, 150.0)))
    # The norm itself is not among those it is compared with, and one that is not finite is not remembered.
    assert said(norms(*[1.0] * 5, math.inf, 99.0, 101.0))[-2:] == [[], ["gradient_explosion"]]


def test_responses_cut_off_from_the_start_are_another_thing_than_those_that_grow():
    cut = {"rollout/truncated": 0.9}
    grown = cut | {"rollout/response_length": 200.0}
    assert said([cut, cut, grown, grown]) == [["cut_off"], [], ["length_explosion"], []]


def change(section, **values):
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)})


@pytest.mark.parametrize("config, dtype, line, expected", [
    (CONFIG, "bfloat16", {"gap/mean": 0.09, "policy/first_ratio_error": 0.19}, []),  # rounding is coarser there
    (CONFIG, "bfloat16", {"gap/mean": 0.11}, ["sampler_gap"]),
    (change("rollout", int8_weights=True), "float32", {"gap/mean": 0.09}, []),
    (change("rollout", int8_cache=True), "float32", {"gap/mean": 0.09}, []),
    (change("guard", max_gap=0.5), "float32", {"gap/mean": 0.4}, []),
    (change("guard", max_gap=1e-7), "float32", {"gap/mean": 2e-7}, ["sampler_gap"]),
    (change("guard", min_entropy=0.7), "float32", {}, ["entropy_collapse"]),
    (change("guard", min_entropy=0.0), "float32", {"rollout/entropy": 1e-9}, []),  # it was so from the start
    (change("guard", max_truncated=1.0), "float32", {"rollout/truncated": 1.0}, []),
    (replace(CONFIG, update=UpdateConfig(old_logprobs="sampler")), "float32", {"policy/first_ratio_error": 0.5}, []),  # it is the gap
])  # fmt: skip
def test_bounds_are_those_of_the_settings(config, dtype, line, expected):
    assert said([line], config, dtype) == [expected]


# Every sign begins somewhere in these, and some twice.
EVENTFUL = [line for lines, _ in CASES.values() for line in [{}, *lines, {}]]
EVENTFUL += [{"optim/grad_norm_max": math.inf, "optim/skipped": 2.0}, {"optim/grad_norm_max": 1e9}]


@pytest.mark.parametrize("killed_after", [*range(0, len(EVENTFUL), 4), len(EVENTFUL) - 1])
def test_a_resumed_run_says_what_it_would_have_said(killed_after, tmp_path):
    lines = [{key: np.float32(value) if key == "gap/mean" else value for key, value in (SOUND | line).items()} for line in EVENTFUL]
    undisturbed = Health(CONFIG, "float32")
    expected = [undisturbed.warnings(iteration, line) for iteration, line in enumerate(lines, start=1)]
    with MetricsWriter(tmp_path, console=False) as writer:  # through the file, where infinities become null
        for iteration, line in enumerate(lines[:killed_after], start=1):
            writer.write(iteration, line)
    resumed = Health(CONFIG, "float32")
    resumed.replay(read_metrics(tmp_path / "metrics.jsonl"))
    assert [resumed.warnings(number, lines[number - 1]) for number in range(killed_after + 1, len(lines) + 1)] == expected[killed_after:]
    assert {name for messages in expected for name in names(messages)} == set(SIGNS)


def settings_of(config, prefix=""):
    for field in fields(config):
        value = getattr(config, field.name)
        yield from settings_of(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]


@pytest.mark.parametrize("sign", SIGNS)
def test_each_message_names_a_setting_there_is_and_stands_in_the_documentation(sign):
    lines, when = CASES[sign]
    health = Health(CONFIG, "float32")
    message = [health.warnings(iteration, SOUND | line) for iteration, line in enumerate(lines, start=1)][-1][0]
    assert message.startswith(f"iteration {when}: ") and "Likely" in message
    words = {word.strip(",.;:()").partition("=")[0] for word in message.split()}
    sections = {field.name for field in fields(Config) if is_dataclass(getattr(CONFIG, field.name))}
    named = {word for word in words if word.partition(".")[0] in sections and "." in word}
    assert named and named <= set(settings_of(CONFIG)), named
    table = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert f"| `{sign}` |" in table
    assert json.dumps(message).isascii()  # it goes to consoles of any encoding
