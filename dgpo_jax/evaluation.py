"""Held-out accuracy of the weights as they are: greedy, and the average over k samples."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from dgpo_jax.build import Parts
from dgpo_jax.config import Config
from dgpo_jax.rl.sampler import EVALUATION, Draw
from dgpo_jax.rollout import build_sampling, make_rollout, to_rows
from dgpo_jax.types import STATUSES, Problem


def make_evaluation(config: Config, parts: Parts, pool) -> Callable[..., tuple[dict, list[dict]]]:
    """Returns the function decode params -> (metrics, rows of responses).

    Metrics: `eval/greedy` and, with k = eval.samples, `eval/avg@k`: the share of right answers, over all held-out
    problems. The samples' keys depend on the seed only, so that evaluations differ in their weights and in nothing
    else. Empty without held-out problems.
    """
    rounds = {"eval/greedy": build_sampling(parts, config.rollout, group_size=1, temperature=0.0)}
    if config.eval.samples:
        rounds[f"eval/avg@{config.eval.samples}"] = build_sampling(
            parts, config.rollout, group_size=config.eval.samples, temperature=config.eval.temperature
        )
    rollouts = {name: make_rollout(parts, sampling, config.rollout.max_prompt) for name, sampling in rounds.items()}

    def evaluate(params):
        metrics, rows = {}, []
        for name, rollout in rollouts.items():
            size = batch_size(config, parts, rounds[name].group_size)
            correct, lengths = [], []
            for first in range(0, len(parts.held_out), size):
                problems = parts.held_out[first : first + size]
                draw = Draw(config.seed, EVALUATION, 0, first)
                responses = rollout(params, pad_problems(problems, size), draw).first(len(problems))
                verdicts = pool.score(responses.answers())
                right = np.array([verdict.correct for verdict in verdicts])
                correct.extend(right)
                lengths.extend(responses.lengths)
                rows += [{"round": name} | row for row in to_rows(responses, verdicts, right)]
            if correct:
                metrics[name] = float(np.mean(correct))
                metrics[f"{name}_length"] = float(np.mean(lengths))
        return metrics, rows

    return evaluate


def batch_size(config: Config, parts: Parts, group_size: int) -> int:
    """Held-out problems sampled at once: as many responses as in a rollout, or all problems if they are fewer."""

    def in_replicas(problems: int) -> int:
        return -(-max(1, problems) // parts.replicas) * parts.replicas

    responses = config.rollout.prompts * config.rollout.group_size
    return min(in_replicas(responses // group_size), in_replicas(len(parts.held_out)))


def pad_problems(problems: list[Problem], size: int) -> list[Problem]:
    """Fills the batch up with its last problem, so that its shape never changes."""
    return [*problems, *[problems[-1]] * (size - len(problems))]


def count_statuses(verdicts) -> dict[str, float]:
    """Share of each status, so that a broken checker shows: {'verdict/correct': 0.5, ...}."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {f"verdict/{status}": counts[status] / len(verdicts) for status in STATUSES}
