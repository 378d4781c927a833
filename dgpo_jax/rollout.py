"""Problems in, checked responses out: the path from text to tokens to text that training and evaluation share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax import hosts
from dgpo_jax.build import Actor
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.rl.drawing import Draw, Sampling
from dgpo_jax.rl.sampler import make_sampler
from dgpo_jax.stopping import Stopping
from dgpo_jax.types import Problem, Prompts, Rollout, Verdict

OnAnswer = Callable[[int, Problem, str], object]


class Responses(NamedTuple):
    """A rollout on the host, with its text; B = Q * G rows."""

    problems: Sequence[Problem]  # Q
    prompts: Prompts
    rollout: Rollout
    texts: list[str]  # B, special tokens left out
    openings: list[str]  # Q, what the prompt began of the response: "<think>" or nothing
    row_steps: int = 0  # as in `sampler.Sampled`

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.texts) // len(self.problems)

    @property
    def lengths(self) -> np.ndarray:
        """i64[B], tokens, the stop token included."""
        return np.asarray(self.rollout.response_mask).sum(axis=1)

    def prompt_ends(self) -> list[str]:
        """B texts: "<think>" where the prompt opened it for the model, as R1-Distill's template does, else ""."""
        return [self.openings[row // self.group_size] for row in range(len(self.texts))]

    def answers(self) -> list[tuple[Problem, str]]:
        """(problem, response) for every row, as the checkers take them; the opening is the response's."""
        return [
            (self.problems[row // self.group_size], opening + text)
            for row, (opening, text) in enumerate(zip(self.prompt_ends(), self.texts, strict=True))
        ]


def make_rollout(
    actor: Actor, sampling: Sampling, max_prompt: int, slots: int, int8_cache: bool = False, stopping: Stopping | None = None
) -> Callable[..., Responses]:
    """Returns the function (decode params, Q problems, Draw of ints, on_answer=None) -> Responses.

    Of several processes each answers its own share of the problems, `hosts.share_of(Q)`, and gets the responses to these.

    `on_answer` is called with (row, problem, text as the checkers take it) as soon as a response has ended, while others
    are still being sampled.

    Args:
        actor: of this process's devices.
        slots: responses decoded at once, by all processes together.
        int8_cache: keep keys and values in eight bits.
        stopping: asked between chunks whether to go on; None = always.
    """
    slots, stopping = -(-slots // hosts.count()), stopping or Stopping()
    sampler = make_sampler(actor.model, sampling, slots=slots, max_prompt=max_prompt, int8_cache=int8_cache)
    tokenizer, size = actor.tokenizer, sampling.group_size

    def rollout(params, problems: Sequence[Problem], draw: Draw, on_answer: OnAnswer | None = None) -> Responses:
        share = hosts.share_of(len(problems))
        problems, draw = problems[share], draw._replace(first_prompt=draw.first_prompt + share.start)
        prompts = encode_prompts(problems, tokenizer, actor.template, max_prompt)
        openings = [actor.template.opening(problem.problem, tokenizer) for problem in problems]
        texts = [""] * (len(problems) * size)

        def finished(row: int, tokens: np.ndarray) -> None:
            texts[row] = tokenizer.decode(tokens, skip_special=True)
            if on_answer is not None:
                on_answer(row, problems[row // size], openings[row // size] + texts[row])

        sampled = sampler(params, prompts, draw, finished, stopping.chunk)
        stopping.drawn()
        return Responses(problems, prompts, sampled.rollout, texts, openings, sampled.row_steps)

    rollout.sampler = sampler
    return rollout


def join(parts: Sequence[Responses]) -> Responses:
    """The responses of several processes, in their order."""
    if len(parts) == 1:
        return parts[0]
    prompts, rollouts = [part.prompts for part in parts], [part.rollout for part in parts]
    return Responses(
        [problem for part in parts for problem in part.problems],
        Prompts(*map(np.concatenate, zip(*prompts, strict=True))),
        Rollout(*map(np.concatenate, zip(*rollouts, strict=True))),
        [text for part in parts for text in part.texts],
        [opening for part in parts for opening in part.openings],
        sum(part.row_steps for part in parts),
    )


def to_rows(responses: Responses, verdicts: Sequence[Verdict], rewards: np.ndarray) -> list[dict]:
    """What is written to disk of every response.

    Args:
        rewards: f32[B].
    """
    lengths = responses.lengths
    return [
        {
            "problem_id": responses.problems[row // responses.group_size].id,
            "sample": row % responses.group_size,
            "problem": responses.problems[row // responses.group_size].problem,
            "answer": responses.problems[row // responses.group_size].answer,
            "response": text,
            "extracted": verdicts[row].extracted,
            "verdict": verdicts[row].status,
            "reward": float(rewards[row]),
            "tokens": int(lengths[row]),
            "truncated": bool(responses.rollout.truncated[row]),
        }
        for row, text in enumerate(responses.texts)
    ]


def build_sampling(actor: Actor, rollout_config) -> Sampling:
    """The sampler's settings for a rollout to learn from."""
    return Sampling(
        group_size=rollout_config.group_size, max_response=rollout_config.max_response, stop_ids=actor.tokenizer.stop_ids,
        pad_id=actor.tokenizer.pad_id, temperature=rollout_config.temperature, top_p=rollout_config.top_p,
        top_k=rollout_config.top_k,
    )  # fmt: skip
