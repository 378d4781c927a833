"""What judged responses are worth: the reward functions of the config, and the penalty for length."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.config import Config
from dgpo_jax.rewards.functions import Sample, load_functions, parse_formula, total, values_of
from dgpo_jax.rewards.shaping import format_reward, overlong_penalty
from dgpo_jax.rollout import Responses
from dgpo_jax.types import STATUSES, Verdict


class Rewards(NamedTuple):
    """Of B responses."""

    scores: np.ndarray  # f32[B], how right the answers are, 0 to 1; 0 without the tags asked for
    rewards: np.ndarray  # f32[B]
    terms: dict[str, np.ndarray]  # f32[B] of each reward function, before its weight


def join(parts: Sequence[Rewards]) -> Rewards:
    """Those of several processes, in their order."""
    scores, rewards = (np.concatenate([getattr(part, field) for part in parts]) for field in ("scores", "rewards"))
    return Rewards(scores, rewards, {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms})


def make_rewards(config: Config) -> Callable[[Responses, Sequence[Verdict]], Rewards]:
    """Returns the function (Responses, B verdicts) -> Rewards.

    Raises:
        ValueError: reward.functions names one that cannot be found.
    """
    formula = parse_formula(config.reward.functions)
    functions = load_functions(formula, answer=lambda sample: answer_reward(config, sample))

    def reward(responses: Responses, verdicts: Sequence[Verdict]) -> Rewards:
        samples = to_samples(responses, verdicts)
        terms = values_of(functions, samples)
        rewards = total(formula, terms) + overlong_penalties(config, responses.lengths)
        scores = np.array([score(config, sample) for sample in samples], np.float32)
        return Rewards(scores, rewards, terms)

    return reward


def to_samples(responses: Responses, verdicts: Sequence[Verdict]) -> list[Sample]:
    """B of them, as reward functions see them."""
    rows = zip(responses.texts, responses.prompt_ends(), verdicts, responses.lengths, responses.rollout.truncated, strict=True)
    return [
        Sample(responses.problems[row // responses.group_size], text, opening, verdict, int(length), bool(truncated))
        for row, (text, opening, verdict, length, truncated) in enumerate(rows)
    ]


def answer_reward(config: Config, sample: Sample) -> float:
    """The function called "answer": between reward.incorrect and reward.correct, or what a missing tag gives in its place."""
    settings = config.reward
    form = form_reward(config, sample)
    if form is not None:
        return form
    return settings.incorrect + (settings.correct - settings.incorrect) * graded(config, sample.verdict)


def score(config: Config, sample: Sample) -> float:
    """How right it is; 0 without the tags asked for, since it then earns no more than others."""
    return 0.0 if form_reward(config, sample) is not None else graded(config, sample.verdict)


def graded(config: Config, verdict: Verdict) -> float:
    """The share of tests that a program passed, or all or nothing if code.grade says so; of other answers 1 or 0."""
    return float(verdict.correct) if config.code.grade == "hard" else verdict.score


def form_reward(config: Config, sample: Sample) -> float | None:
    """The reward of a response that did not think in tags, None where the answer decides."""
    settings = config.reward
    return format_reward(
        sample.opening, sample.response, no_think_end=settings.no_think_end, no_think_start=settings.no_think_start
    )


def overlong_penalties(config: Config, length: np.ndarray) -> np.ndarray:
    """f32[B], 0 or less."""
    settings = config.reward
    return overlong_penalty(
        length, max_response=config.rollout.max_response, buffer=settings.overlong_buffer, factor=settings.overlong_penalty
    )


def reward_metrics(config: Config, terms: dict[str, np.ndarray], samples: Sequence[Sample]) -> dict[str, float]:
    """Means of what makes up the reward, over all responses."""
    figures = {f"reward/{name}": float(values.mean()) for name, values in terms.items()}
    if config.reward.overlong_buffer:
        length = np.array([sample.tokens for sample in samples])
        figures["reward/overlong"] = float(overlong_penalties(config, length).mean())
    if config.reward.no_think_end is not None or config.reward.no_think_start is not None:
        figures["reward/no_think"] = float(np.mean([form_reward(config, sample) is not None for sample in samples]))
    return figures


def count_statuses(verdicts) -> dict[str, float]:
    """Share of each status, so that a broken checker shows: {'verdict/correct': 0.5, ...}."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {f"verdict/{status}": counts[status] / len(verdicts) for status in STATUSES}
