"""Updates that are not finite: skipped, counted, and the sequences to look at on the disk. On eight devices.

tests/test_update.py has one device too, and other meshes: there, what decides that an update is skipped.
"""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from compilations import compilations
from tiny_config import get_config

from dgpo_jax import build
from dgpo_jax.config import MeshConfig
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.keeping import report_skipped
from dgpo_jax.learning import StoppedAmid, learn
from dgpo_jax.metrics import write_lines
from dgpo_jax.recipe import resolve
from dgpo_jax.rl.packing import Example, Layout, Place, Shape, split_groups
from dgpo_jax.rl.suspects import LOGPROB, LOSS, Marks, extremes, find_suspects
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.stopping import Stop
from dgpo_jax.types import Experience, Rollout

ITERATION = 12
GROUPS, SIZE = 4, 2
ADVANTAGES = np.array([[1.0, -1.0], [0.5, -0.5], [0.25, -0.25], [2.0, -2.0]], np.float32)
LENGTHS = np.array([3, 5, 2, 4, 3, 6, 2, 2])


def config_for(**update):
    """Untied, so that the embedding of a word breaks only what reads it, and little to compile."""
    config = get_config()
    return resolve(replace(
        config, mesh=MeshConfig(data=1, fsdp=4, tensor=2), model=replace(config.model, tied_embeddings=False, layers=1),
        rollout=replace(config.rollout, prompts=GROUPS, group_size=SIZE), update=replace(config.update, updates=2, **update),
    ))  # fmt: skip


class Run:
    """Parts, programs and weights."""

    def __init__(self):
        self.parts = build.build_parts(config_for())
        self.programs = build.build_programs(config_for(), self.parts)
        self.start = to_host(build.build_state(config_for(), self.parts))

    def state(self):
        """A new one each time: an update takes the old one's memory."""
        return to_device(self.start, self.parts.shardings.state)

    def experience(self):
        """Response number r says nothing but the word 100 + r."""
        config = config_for()
        prompts = encode_prompts(self.parts.stream.take(0, GROUPS), self.parts.tokenizer, self.parts.template, config.rollout.max_prompt)
        mask = np.arange(config.rollout.max_response) < LENGTHS[:, None]
        words = np.where(mask, 100 + np.arange(8)[:, None], 0).astype(np.int32)
        rollout = Rollout(words, mask, np.where(mask, np.float32(-3), 0), np.zeros(8, bool))
        rewards = np.arange(8, dtype=np.float32)
        return Experience(prompts, rollout, np.full(mask.shape, np.nan, np.float32), rewards / 8, rewards, np.full(GROUPS, 11, np.int32))

    def learn(self, state, advantages, experience=None, **update):
        """(TrainState, metrics, lines that were reported, one list per report)."""
        reports, config = [], config_for(**update)
        experience = self.experience() if experience is None else experience
        state, metrics = learn(
            config, self.parts, self.programs, state, experience, advantages, ITERATION, report=reports.append
        )
        return state, metrics, reports


@pytest.fixture(scope="module")
def run():
    return Run()


def changed(*places, value):
    """The advantages with some of them replaced: (group, sample), from 0."""
    advantages = ADVANTAGES.copy()
    for place in places:
        advantages[place] = value
    return advantages


def update_of(group):
    """Which update of the iteration learns from this group; from 1."""
    return 1 + next(number for number, groups in enumerate(split_groups(GROUPS, 2, get_config().seed, ITERATION)) if group in groups)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, to_host(one), to_host(other))


def test_a_sound_iteration_reports_nothing_and_compiles_each_program_once(run):
    state, metrics, reports = run.learn(run.state(), ADVANTAGES)
    assert reports == [] and metrics["optim/skipped"] == 0 and int(state.update) == 2
    assert "optim/tokens_not_finite" not in metrics
    with compilations() as seen:
        run.learn(state, changed((0, 0), value=np.nan))  # nor does a broken one need another program
    assert seen == []


def test_an_advantage_that_is_not_a_number_names_its_response(run):
    state, metrics, (lines,) = run.learn(run.state(), changed((2, 1), value=np.nan))
    assert int(state.update) == 1 and metrics["optim/skipped"] == 1
    assert metrics["optim/tokens_not_finite"] == 6 and np.isnan(metrics["policy/loss"])
    (line,) = lines
    assert (line["update"], line["group"], line["sample"]) == (update_of(2), 3, 2)
    assert (line["sampled_in_iteration"], line["reward"], line["score"]) == (11, 5.0, 5 / 8)
    assert line["not_finite"] == ["loss"] and line["given_not_finite"] == ["advantage"]  # so it is not the model's fault
    assert (line["tokens_not_finite"], line["first_token_not_finite"]) == (6, 0)
    assert line["weight"] > 0 and line["supervised"] == 0 and line["microbatch"] == 1 and line["row"] >= 1
    assert line["response_tokens"] == [105] * 6 and line["response"] == run.parts.tokenizer.decode([105] * 6)
    problem = run.parts.stream.take(0, GROUPS)[2].problem
    assert problem in line["prompt"] and run.parts.tokenizer.decode(line["prompt_tokens"]) == line["prompt"]
    # What the sampler said is known; what the trainer said was on the device only.
    assert line["sampler_logprobs"] == [-3, -3]
    low, high = line["old_logprobs"]
    assert -20 < low <= high < 0 and (low, high) != (-3, -3)


def test_when_every_update_is_skipped_the_state_is_the_same_to_the_bit(run):
    state, metrics, (lines,) = run.learn(run.state(), changed(*np.ndindex(GROUPS, SIZE), value=np.inf))
    assert_same(state, run.start)
    assert metrics["optim/skipped"] == metrics["optim/skipped_in_a_row"] == 2
    assert {(line["group"], line["sample"]) for line in lines} == {(group, sample) for group in range(1, 5) for sample in (1, 2)}
    assert [line["update"] for line in lines] == sorted(update_of(line["group"] - 1) for line in lines)


def test_a_word_with_a_broken_embedding_names_the_response_that_says_it(run):
    table = run.start.params["embed"]["table"].copy()
    table[105] = np.inf
    params = dict(run.start.params, embed=dict(run.start.params["embed"], table=table))
    state = to_device(run.start._replace(params=params), run.parts.shardings.state)
    _, metrics, (lines,) = run.learn(state, ADVANTAGES)
    assert metrics["optim/skipped"] == 1
    (line,) = [line for line in lines if (line["group"], line["sample"]) == (3, 2)]
    assert line["not_finite"] == ["log-probability", "loss"] and line["given_not_finite"] == ["old_logprobs"]
    assert (line["tokens_not_finite"], line["old_logprobs"]) == (6, None)
    # By 0 times NaN its first token is marked too, and others of the same packed row may be, but none of another.
    assert {(other["update"], other["microbatch"], other["row"]) for other in lines} == {(line["update"], line["microbatch"], line["row"])}


def test_a_gradient_that_overflows_names_its_microbatch(run):
    _, metrics, (lines,) = run.learn(run.state(), changed((1, 0), value=1e25))
    assert metrics["optim/skipped"] == 1 and "optim/tokens_not_finite" not in metrics
    assert np.isinf(metrics["optim/grad_norm_max"])
    assert {line["update"] for line in lines} == {update_of(1)} and len(lines) == 4  # two groups in one microbatch
    assert all(line["not_finite"] == ["gradient of the microbatch"] for line in lines)
    assert all(line["tokens_not_finite"] == 0 and line["first_token_not_finite"] is None for line in lines)
    assert max(lines, key=lambda line: abs(line["advantage"]))["group"] == 2  # which is what to look for


def test_a_stop_after_a_skipped_update_reports_it_and_the_rest_of_the_iteration_does_not_again(run):
    """The first update is broken, the second is after the restart, and broken too."""
    first, second = (next(group for group in range(GROUPS) if update_of(group) == number) for number in (1, 2))
    advantages, reports, asked = changed((first, 0), (second, 0), value=np.nan), [], itertools.count()

    def between():
        if next(asked) == 3:  # two microbatches are scored, and the first is learned from
            raise Stop

    def go_on(state, experience, **where):
        return learn(
            config_for(), run.parts, run.programs, state, experience, advantages, ITERATION, report=reports.append, **where
        )

    with pytest.raises(StoppedAmid) as caught:
        go_on(run.state(), run.experience(), skipped=3, between=between)
    stop = caught.value
    assert stop.skipped == 4 and len(stop.results) == 1
    state, metrics = go_on(stop.state, stop.experience, skipped=stop.skipped, results=stop.results)
    assert metrics["optim/skipped"] == 2 and metrics["optim/skipped_in_a_row"] == 5
    assert_same(state, run.start)
    assert [{line["update"] for line in lines} for lines in reports] == [{1}, {2}]
    _, _, (whole,) = run.learn(run.state(), advantages)
    np.testing.assert_equal(reports[0] + reports[1], whole)  # with the same old log-probabilities


def test_what_a_stop_amid_updates_has_left_of_the_reports_stays(tmp_path):
    path = tmp_path / "nonfinite" / "iteration_000012.jsonl"
    for rows in ([{"update": 1}, {"update": 2}], [{"update": 3}], [{"update": 3}, {"update": 4}]):  # the third after a kill
        report_skipped(tmp_path, ITERATION, rows)
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_the_lines_are_read_back_from_their_file(run, tmp_path):
    path = tmp_path / "nonfinite" / "iteration_000012.jsonl"
    _, _, (lines,) = run.learn(run.state(), changed((2, 1), (3, 0), value=np.nan))
    write_lines(path, lines)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["advantage"] for line in read] == [None, None]  # JSON has no NaN
    assert read == [line | {"advantage": None} for line in lines]


def test_with_the_samplers_logprobs_they_are_what_the_loss_saw(run):
    experience = run.experience()
    experience = experience._replace(old_logprobs=experience.rollout.logprobs)
    _, _, (lines,) = run.learn(run.state(), changed((2, 1), value=np.nan), experience, old_logprobs="sampler")
    assert [line["old_logprobs"] for line in lines] == [[-3, -3]]


# --- marks to suspects, by hand ---


def layout_of(*batches):
    """One sequence a row, the first in the first row of its microbatch, and so on."""
    places = [Place(batch, batches[:at].count(batch), 1, 0) for at, batch in enumerate(batches)]
    return Layout(Shape(2, 4), places, max(batches) + 1, 0, np.zeros((1, 1)))


def mark(norm, tokens=((0, 0, 0, 0), (0, 0, 0, 0))):
    return Marks(np.array(tokens, np.uint8), np.float32(norm))


@pytest.mark.parametrize("marks, expected", [
    ([mark(np.nan, ((0, LOSS, 0, 0), (0, 0, 0, 0))), mark(np.nan)], {0: ["loss"]}),
    ([mark(np.nan, ((0, 0, LOGPROB | LOSS, 0), (0, LOGPROB, 0, 0)))] * 2,
     {at: [["log-probability", "loss"], ["log-probability"]][at % 2] for at in range(4)}),
    ([mark(1.0), mark(np.inf)], {2: ["gradient of the microbatch"], 3: ["gradient of the microbatch"]}),
    ([mark(np.inf), mark(np.inf, ((0, LOSS, 0, 0), (0, 0, 0, 0)))],  # an overflow, and then a fault of another kind
     {0: ["gradient of the microbatch"], 1: ["gradient of the microbatch"], 2: ["loss"]}),
    ([mark(1.0), mark(1.0)], {at: ["sum of the loss"] for at in range(4)}),
])  # fmt: skip
def test_marks_become_suspects(marks, expected):
    examples = [Example(np.zeros(1, int), np.zeros(3, int), 0.0, 0.0, 1.0, 1.0)] * 4
    assert {suspect.index: suspect.not_finite for suspect in find_suspects(examples, layout_of(0, 0, 1, 1), marks)} == expected


@pytest.mark.parametrize("numbers, expected", [
    ([-1.0, -3.0, -2.0], [-3, -1]),
    ([np.nan, -2.0, -np.inf], [-2, -2]),
    ([np.nan], None),
    (0.0, [0, 0]),  # one for all tokens
])  # fmt: skip
def test_extremes_are_those_of_finite_numbers(numbers, expected):
    assert extremes(numbers) == expected
