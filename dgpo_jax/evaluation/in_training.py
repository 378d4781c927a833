"""Accuracy of the weights as they are, in training: what `dgpo_jax.evaluate` reports, without its files."""

from collections.abc import Callable, Sequence

from dgpo_jax.build import Parts
from dgpo_jax.config import Config
from dgpo_jax.evaluation.judging import GREEDY, Answered, figures
from dgpo_jax.evaluation.sampling import answer_set, make_rounds


def make_evaluation(config: Config, parts: Parts, checkers) -> Callable[..., tuple[dict, list[dict]]]:
    """Returns the function decode params -> (metrics, rows of responses).

    Metrics, with k = eval.samples: `eval/greedy`, `eval/avg@k`, `eval/pass@k` and (of mathematics) `eval/maj@k` of the
    held-out problems, `eval/NAME/...` of each benchmark, and the mean tokens of a response as `eval/greedy_length` and
    `eval/avg@k_length`. The samples' keys depend on the seed only, so that evaluations differ in their weights and in
    nothing else. Empty where there is nothing to evaluate on.

    Args:
        checkers: a `rewards.checkers.Checkers` for the problems of all sets.
    """
    sets = {"eval": parts.held_out} | {f"eval/{name}": problems for name, problems in parts.benchmarks.items()}
    sets = {prefix: problems for prefix, problems in sets.items() if len(problems)}
    rounds = make_rounds(config, parts, max(map(len, sets.values()), default=1))

    def evaluate(params):
        metrics, rows = {}, []
        for prefix, problems in sets.items():
            for name, way in rounds.items():
                done = answer_set(way, params, problems, checkers, config.seed)
                found, label = name_figures(name, prefix, done)
                metrics |= found
                rows += to_eval_rows(label, done)
        return metrics, rows

    return evaluate


def name_figures(name: str, prefix: str, done: Sequence[Answered]) -> tuple[dict[str, float], str]:
    """Metrics of one round over one set, and the key of the main one."""
    found = {key: value.value for key, value in figures(done).items()}
    n = len(done[0].responses)
    label = f"{prefix}/{GREEDY}" if name == GREEDY else f"{prefix}/avg@{n}"
    metrics = {label: found[f"avg@{n}"], f"{label}_length": found["tokens"]}
    if name != GREEDY:
        metrics |= {f"{prefix}/{key}": found[key] for key in (f"pass@{n}", f"maj@{n}") if key in found}
    return metrics, label


def to_eval_rows(label: str, done: Sequence[Answered]) -> list[dict]:
    """What is written to disk of every response, with the names of `rollout.to_rows`."""
    return [
        {
            "round": label,
            "problem_id": problem.id,
            "sample": sample,
            "problem": problem.problem,
            "answer": problem.answer,
            "response": response.text,
            "extracted": response.verdict.extracted,
            "verdict": response.verdict.status,
            "reward": response.verdict.score,
            "tokens": response.tokens,
            "truncated": response.truncated,
        }
        for problem, responses in done
        for sample, response in enumerate(responses)
    ]
