"""Answers to whole sets of problems: batch after batch is sampled, and judged by worker processes meanwhile.

    rounds = make_rounds(config, actor, largest=len(problems))
    with build_checkers(config, problems) as checkers:
        done = generate_set(path, rounds["samples"], params, problems, checkers, config.seed)  # on disk, resumable
        done = answer_set(rounds["greedy"], params, problems, checkers, config.seed)  # in memory

A batch is Q problems with their n samples; where these are more than may be decoded at once, some wait for the slots of
others. Sample s of problem p is drawn with keys of (seed, p, s) alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dgpo_jax import hosts
from dgpo_jax.build import Actor
from dgpo_jax.config import Config
from dgpo_jax.evaluation.generations import Generations
from dgpo_jax.evaluation.judging import GREEDY, SAMPLES, Answered, Judged, judge
from dgpo_jax.rl.drawing import EVALUATION, Draw, Sampling
from dgpo_jax.rollout import Responses, make_rollout
from dgpo_jax.stopping import Stopping
from dgpo_jax.types import Problem


class Round(NamedTuple):
    """One way to answer every problem of a set."""

    samples: int  # n responses to each problem
    problems: int  # Q, of a batch
    rollout: Callable[..., Responses]


class Sample(NamedTuple):
    """One response, not judged yet."""

    text: str
    tokens: int
    truncated: bool


def make_rounds(config: Config, actor: Actor, largest: int, stopping: Stopping | None = None) -> dict[str, Round]:
    """What `config.eval` asks for: GREEDY, a response at temperature 0; SAMPLES, eval.samples of them; or both.

    Args:
        largest: problems of the largest set.
        stopping: as in `rollout.make_rollout`.
    """
    rounds = {}
    if config.eval.greedy:
        rounds[GREEDY] = make_round(config, actor, largest, samples=1, temperature=0.0, stopping=stopping)
    if config.eval.samples:
        rounds[SAMPLES] = make_round(config, actor, largest, config.eval.samples, config.eval.temperature, stopping)
    return rounds


def make_round(
    config: Config, actor: Actor, largest: int, samples: int, temperature: float, stopping: Stopping | None = None
) -> Round:
    """A round of so many responses to each problem; 0 is the greedy temperature."""
    at_once = config.eval.responses or config.rollout.prompts * config.rollout.group_size
    problems, slots = batch_of(at_once, samples, largest)
    tokens, tokenizer = config.eval.max_response or config.rollout.max_response, actor.tokenizer
    sampling = Sampling(
        samples, tokens, tokenizer.stop_ids, tokenizer.pad_id, temperature, config.eval.top_p, config.rollout.top_k
    )
    return Round(samples, problems, make_rollout(actor, sampling, config.rollout.max_prompt, slots, stopping=stopping))


def batch_of(at_once: int, samples: int, largest: int) -> tuple[int, int]:
    """(problems of a batch, responses decoded at once): whole problems that fit, or one whose samples take turns."""
    problems = max(1, min(at_once // samples, largest))
    return problems, min(at_once, problems * samples)


def generate_set(
    path: Path, way: Round, params, problems: Sequence[Problem], checkers, seed: int, advance=lambda count: None
) -> list[Answered]:
    """Answers the problems of the set that the file at `path` lacks, and writes them there as soon as they are judged.

    The file ends up the same, to the bit, however often this was killed and called again, on the same machine with the
    same number of problems a batch: one that was under way is sampled again as a whole.

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
    """The n responses to each of up to Q problems; of several processes each has sampled its share, and gets all."""
    rows = [sample for share in hosts.gather(to_samples(way.rollout(params, problems, draw))) for sample in share]
    return [rows[start : start + way.samples] for start in range(0, len(rows), way.samples)]


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
