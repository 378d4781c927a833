"""Answers to whole sets of problems: batch after batch is sampled, and judged by worker processes meanwhile.

    rounds = make_rounds(config, actor, largest=len(problems))
    with build_checkers(config, problems) as checkers:
        done = generate_set(path, rounds["samples"], params, problems, checkers, config.seed)  # on disk, resumable
        done = answer_set(rounds["greedy"], params, problems, checkers, config.seed)  # in memory

A batch is Q problems times G samples, always of the same shape. Where n samples of Q problems are too many at once they
come in slices: sample s of problem p is drawn with keys of (seed, p, s) alone, so how they are cut up changes no text.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.build import Actor, Parts
from dgpo_jax.config import Config
from dgpo_jax.evaluation.generations import Generations
from dgpo_jax.evaluation.judging import GREEDY, SAMPLES, Answered, Judged, judge
from dgpo_jax.rl.sampler import EVALUATION, Draw, Sampling
from dgpo_jax.rollout import Responses, make_rollout
from dgpo_jax.types import Problem


class Round(NamedTuple):
    """One way to answer every problem of a set."""

    samples: int  # n responses to each problem
    problems: int  # Q, sampled at once
    sampling: Sampling  # its group_size is G, samples of a problem at once
    rollout: Callable[..., Responses]

    @property
    def slices(self) -> int:
        """Batches that it takes until each of Q problems has its n responses; the last may have some too many."""
        return -(-self.samples // self.sampling.group_size)


class Sample(NamedTuple):
    """One response, not judged yet."""

    text: str
    tokens: int
    truncated: bool


def make_rounds(config: Config, actor: Actor | Parts, largest: int) -> dict[str, Round]:
    """What `config.eval` asks for: GREEDY, a response at temperature 0; SAMPLES, eval.samples of them; or both.

    Args:
        largest: problems of the largest set; smaller ones are filled up, so that each round compiles once.
    """
    rounds = {}
    if config.eval.greedy:
        rounds[GREEDY] = make_round(config, actor, largest, samples=1, temperature=0.0)
    if config.eval.samples:
        rounds[SAMPLES] = make_round(config, actor, largest, config.eval.samples, config.eval.temperature)
    return rounds


def make_round(config: Config, actor: Actor | Parts, largest: int, samples: int, temperature: float) -> Round:
    """A round of so many responses to each problem; 0 is the greedy temperature."""
    at_once = config.eval.responses or config.rollout.prompts * config.rollout.group_size
    problems, group_size = batch_shape(at_once, samples, largest, actor.replicas)
    tokens, tokenizer = config.eval.max_response or config.rollout.max_response, actor.tokenizer
    sampling = Sampling(
        group_size, tokens, tokenizer.stop_ids, tokenizer.pad_id, temperature, config.eval.top_p, config.rollout.top_k
    )
    return Round(samples, problems, sampling, make_rollout(actor, sampling, config.rollout.max_prompt))


def batch_shape(at_once: int, samples: int, largest: int, replicas: int) -> tuple[int, int]:
    """(Q problems, G samples of each) of a batch of at most so many responses, unless the replicas are more.

    Whole problems if all samples of one fit for every replica, else slices of nearly the same size. The replicas share
    the Q problems evenly.
    """
    share = max(1, at_once // replicas)  # responses for each replica
    if samples <= share:
        enough = math.ceil(max(1, largest) / replicas)
        return replicas * min(share // samples, enough), samples
    return replicas, math.ceil(samples / math.ceil(samples / share))


def generate_set(
    path: Path, way: Round, params, problems: Sequence[Problem], checkers, seed: int, advance=lambda count: None
) -> list[Answered]:
    """Answers the problems of the set that the file at `path` lacks, and writes them there as soon as they are judged.

    The file ends up the same, to the bit, however often this was killed and called again, on the same machine with the
    same batch shape: a batch that was under way is sampled again as a whole.

    Args:
        params: decode params; may be None if nothing is lacking.
        seed: of the samples.
        advance: called with the number of problems that have been done.
    Returns:
        All problems of the set with their judged responses.
    Raises:
        ValueError: the file holds something else.
    """
    with Generations(path, problems, way.samples) as store:
        advance(len(store.done))

        def keep(answered: Answered) -> None:
            store.append(answered)
            advance(1)

        answer(way, params, problems, checkers, seed, keep, first=len(store.done))
        return store.done


def answer_set(way: Round, params, problems: Sequence[Problem], checkers, seed: int) -> list[Answered]:
    """The same in memory."""
    done: list[Answered] = []
    answer(way, params, problems, checkers, seed, done.append)
    return done


def answer(
    way: Round,
    params,
    problems: Sequence[Problem],
    checkers,
    seed: int,
    keep: Callable[[Answered], None],
    first: int = 0,
) -> None:
    """Samples and judges, and calls `keep` for every problem from number `first` on, in order.

    While a batch is being sampled the one before it is judged and kept, by a thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge") as thread:
        under_way: Future | None = None
        # Whole batches from where the first one began: the same problems in the same rows give the same bits.
        begin = first - first % way.problems if first < len(problems) else first
        for start in range(begin, len(problems), way.problems):
            batch = problems[start : start + way.problems]
            samples = sample_batch(way, params, batch, Draw(seed, EVALUATION, 0, start))
            if under_way is not None:
                under_way.result()  # raises what went wrong there
            skipped = max(0, first - start)
            under_way = thread.submit(judge_batch, checkers, batch[skipped:], samples[skipped:], keep)
        if under_way is not None:
            under_way.result()


def sample_batch(way: Round, params, problems: Sequence[Problem], draw: Draw) -> list[list[Sample]]:
    """The n responses to each of up to Q problems."""
    padded = pad_problems(problems, way.problems)
    samples: list[list[Sample]] = [[] for _ in problems]
    for number in range(way.slices):
        responses = way.rollout(params, padded, draw._replace(first_sample=number * way.sampling.group_size))
        rows = to_samples(responses)
        for place, row in enumerate(samples):
            row += rows[place * responses.group_size : (place + 1) * responses.group_size]
    return [row[: way.samples] for row in samples]


def to_samples(responses: Responses) -> list[Sample]:
    """One for each row."""
    lengths, truncated = responses.lengths, responses.rollout.truncated
    return [Sample(text, int(lengths[row]), bool(truncated[row])) for row, (_, text) in enumerate(responses.answers())]


def judge_batch(checkers, problems: Sequence[Problem], samples: Sequence[Sequence[Sample]], keep) -> None:
    """Judges the responses to all these problems at once, and keeps them in order."""
    tickets = [
        [checkers.submit(problem, sample.text) for sample in row]
        for problem, row in zip(problems, samples, strict=True)
    ]
    for problem, row, waiting in zip(problems, samples, tickets, strict=True):
        verdicts, votes = judge(checkers, problem, waiting)
        keep(Answered(problem, [
            Judged(sample.text, verdict, vote, sample.tokens, sample.truncated)
            for sample, verdict, vote in zip(row, verdicts, votes, strict=True)
        ]))  # fmt: skip


def pad_problems(problems: Sequence[Problem], size: int) -> list[Problem]:
    """Fills the batch up with its last problem, so that its shape never changes."""
    return [*problems, *[problems[-1]] * (size - len(problems))]
