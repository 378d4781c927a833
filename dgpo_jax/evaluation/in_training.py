"""Accuracy of the weights as they are, in training: what `dgpo_jax.evaluate` reports, without its files."""

from collections.abc import Callable, Sequence
from functools import partial

from dgpo_jax.build import Parts, local_actor
from dgpo_jax.config import Config
from dgpo_jax.data.benchmarks import HELD_OUT
from dgpo_jax.evaluation.judging import GREEDY, Answered, figures, share
from dgpo_jax.evaluation.sampling import answer_set, make_rounds
from dgpo_jax.rewarding import graded
from dgpo_jax.stopping import Stopping
from dgpo_jax.types import Verdict


def make_evaluation(config: Config, parts: Parts, checkers, stopping: Stopping | None = None) -> Callable[..., tuple[dict, list[dict]]]:
    """Returns the function decode params -> (metrics, rows of responses).

    Metrics, with k = eval.samples: `eval/greedy`, `eval/avg@k`, `eval/pass@k` and (of mathematics) `eval/maj@k` of the
    held-out problems, `eval/NAME/...` of each benchmark, and the mean tokens of a response as `eval/greedy_length` and
    `eval/avg@k_length`. Problems that are too long to be asked count as wrong. The samples' keys depend on the seed
    only, so that evaluations differ in their weights and in nothing else. Empty where there is nothing to evaluate on.

    The function's `samplers` are those it uses, by the name of the round, so that their programs can be compiled ahead.

    Args:
        checkers: a `rewards.checkers.Checkers` for the problems of all sets.
        stopping: as in `rollout.make_rollout`.
    """
    sets = {HELD_OUT: parts.held_out} | parts.benchmarks
    sets = {name: problems for name, problems in sets.items() if len(problems)}
    rounds = make_rounds(config, local_actor(parts), max(map(len, sets.values()), default=1), stopping)
    grade = partial(graded, config)

    def evaluate(params):
        metrics, rows = {}, []
        for name, problems in sets.items():
            prefix = "eval" if name == HELD_OUT else f"eval/{name}"
            for way, settings in rounds.items():
                done = answer_set(settings, params, problems, checkers, config.seed)
                found, label = name_figures(way, prefix, done, parts.unasked.get(name, 0), grade)
                metrics |= found
                rows += to_eval_rows(label, done, grade)
        return metrics, rows

    evaluate.samplers = {way: settings.rollout.sampler for way, settings in rounds.items()} if sets else {}
    return evaluate


def name_figures(
    way: str, prefix: str, done: Sequence[Answered], unasked: int = 0, grade: Callable[[Verdict], float] = share
) -> tuple[dict[str, float], str]:
    """Metrics of one round over one set, and the key of the main one.

    Args:
        way: GREEDY or SAMPLES.
        unasked: problems of the set that were too long to be asked; they count as wrong.
        grade: what a verdict is worth, 0 to 1.
    """
    found = {key: value.value for key, value in figures(done, unasked, grade).items()}
    n = len(done[0].responses)
    if way == GREEDY:
        label, main = f"{prefix}/{GREEDY}", "pass@1"  # solved or not, as `evaluate` reports it
    else:
        label, main = f"{prefix}/avg@{n}", f"avg@{n}"
    metrics = {label: found[main], f"{label}_length": found["tokens"]}
    if way != GREEDY:
        metrics |= {f"{prefix}/{key}": found[key] for key in (f"pass@{n}", f"maj@{n}") if key in found}
    return metrics, label


def to_eval_rows(label: str, done: Sequence[Answered], grade: Callable[[Verdict], float] = share) -> list[dict]:
    """What is written to disk of every response, with the names of `rollout.to_rows`; a score is no reward."""
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
            "score": grade(response.verdict),
            "tokens": response.tokens,
            "truncated": response.truncated,
        }
        for problem, responses in done
        for sample, response in enumerate(responses)
    ]
