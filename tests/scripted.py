"""A model whose gradient can be written by hand and responses that are written down beforehand: for tests of a recipe."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpo_jax.build import Parts
from dgpo_jax.config import Config, ModelConfig, OptimizerConfig, RolloutConfig, UpdateConfig
from dgpo_jax.data.problems import ProblemStream
from dgpo_jax.recipe import resolve
from dgpo_jax.rl.update import Shardings
from dgpo_jax.rollout import Responses
from dgpo_jax.sharding import make_mesh
from dgpo_jax.types import Experience, Problem, Prompts, Rollout, TrainBatch, TrainState, Verdict

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4])  # of the four tokens, unless a test says otherwise
SAMPLER_LOGPROB = -9.0  # of every token: nothing like the trainer's
P, R = 1, 4  # slots


class Unigram:
    """Logits that are the parameters, whatever came before: the gradient of a log-probability is onehot - softmax."""

    config, mesh = ModelConfig(), None

    def hidden(self, params, tokens, segment, position):
        return jnp.ones((*tokens.shape, 1), jnp.float32)

    def unembedding(self, params):
        return params["logits"][None]


def unigram(probabilities=PROBABILITIES):
    """Params that give the four tokens these probabilities."""
    return jax.device_put({"logits": np.log(np.asarray(probabilities, np.float32))}, HERE)


def unigram_state(probabilities=PROBABILITIES):
    """An update moves the logits by minus the gradient: no moments, no clipping, and a learning rate of 1."""
    return TrainState(jax.device_put(np.int32(0), HERE), unigram(probabilities), optax.identity().init(None))


def config_for(settings: dict | None = None) -> Config:
    """A resolved config; settings by dotted name, {"loss.method": "grpo"}.

    Two sequences of prompt and response, or one, fit a row, and a microbatch is one row.
    """
    config = Config(
        rollout=RolloutConfig(prompts=1, group_size=2, max_prompt=P, max_response=R),
        update=UpdateConfig(updates=1, tokens_per_row=8, tokens_per_device=8, logprob_chunk=4),
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_iterations=0),
    )
    return resolve(change(config, settings or {}))


def change(config: Config, settings: dict) -> Config:
    """With these settings, by dotted name."""
    for name, value in settings.items():
        part, _, field = name.rpartition(".")
        config = replace(config, **({part: replace(getattr(config, part), **{field: value})} if part else {field: value}))
    return config


def make_parts(scripts: Sequence[str] = ("rw",)) -> Parts:
    """Of the unigram. The stream's problem number k has script k: a letter of SAYINGS for each sample."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shardings = Shardings(TrainState(HERE, HERE, HERE), TrainBatch(*[HERE] * len(TrainBatch._fields)), HERE)
    tokenizer = SimpleNamespace(stop_ids=(0,), pad_id=0)
    return Parts(mesh, "", tokenizer, None, Unigram(), in_order(scripts), [], {}, {}, 0, {}, optax.identity(), shardings)


def in_order(scripts: Sequence[str]) -> ProblemStream:
    """A stream whose first epoch is these scripts as they stand; a problem's id is its place."""
    places = ProblemStream(range(len(scripts)), seed=0).take(0, len(scripts))
    problems = {shuffled: Problem(str(place), scripts[place], "r", "script") for place, shuffled in enumerate(places)}
    return ProblemStream([problems[index] for index in range(len(scripts))], seed=0)


class Said(NamedTuple):
    """One response."""

    tokens: Sequence[int]
    right: bool
    truncated: bool = False


SAYINGS = {
    "r": Said([1], True), "w": Said([2, 2], False),
    "R": Said([1] * R, True, truncated=True), "W": Said([2] * R, False, truncated=True),
}  # fmt: skip


def to_rollout(said: Sequence[Said]) -> Rollout:
    response, mask = np.zeros((len(said), R), np.int32), np.zeros((len(said), R), bool)
    for row, (tokens, *_) in enumerate(said):
        response[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    logprobs = np.where(mask, np.float32(SAMPLER_LOGPROB), np.float32(0))
    return Rollout(response, mask, logprobs, np.array([one.truncated for one in said]))


def experience_of(*groups: Sequence[Said], iteration: int = 1) -> Experience:
    """Groups sampled in that iteration, a right answer worth 1, with log-probabilities that are yet to be computed."""
    said = [one for group in groups for one in group]
    right, rollout = np.array([one.right for one in said]), to_rollout(said)
    return Experience(
        prompts_of(range(len(groups))), rollout, np.full_like(rollout.logprobs, np.nan), right, right.astype(np.float32),
        np.full(len(groups), iteration, np.int32),
    )  # fmt: skip


def prompts_of(numbers: Sequence[int]) -> Prompts:
    """One token each."""
    tokens = np.array(numbers, np.int32).reshape(-1, P)
    return Prompts(tokens, np.ones_like(tokens, bool))


class ScriptedRollout:
    """In place of what `rollout.make_rollout` returns: answers by the problems' scripts and notes what it was asked."""

    def __init__(self):
        self.calls = []  # (weights, places of the problems, Draw)
        self.texts = {}  # what a letter says, if not itself; the checker reads the last character
        self.opening = ""  # what every prompt began of its responses

    def __call__(self, weights, problems, draw, on_answer) -> Responses:
        places = [int(problem.id) for problem in problems]
        self.calls.append((weights, places, draw))
        letters = "".join(problem.problem for problem in problems)
        rollout = to_rollout([SAYINGS[letter] for letter in letters])
        texts = [self.texts.get(letter, letter) for letter in letters]
        responses = Responses(
            problems, prompts_of(places), rollout, texts, [self.opening] * len(problems), row_steps=2 * rollout.response_mask.size
        )
        rows = list(enumerate(responses.answers()))
        for row, answer in sorted(rows, key=lambda one: len(one[1][1])):  # responses end in another order than they began
            on_answer(row, *answer)
        return responses


class ScriptedPool:
    """A checker that goes by the script's letter, the last of a response."""

    def __init__(self):
        self.asked = []

    def submit(self, problem, text):
        self.asked.append(text)
        return Verdict("correct" if text[-1] in "rR" else "wrong", text[-1])

    def gather(self, tickets, between=None):
        return list(tickets)


class Notebook:
    """A MetricsWriter that only remembers the responses."""

    def __init__(self):
        self.rows = {}

    def write_rollouts(self, iteration, rows):
        self.rows[iteration] = rows
