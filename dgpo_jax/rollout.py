"""Problems in, checked responses out: the path from text to tokens to text that training and evaluation share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dgpo_jax.build import Actor, Parts, prompt_shardings, rollout_shardings
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.rl.sampler import Draw, Sampling, make_sampler
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.types import Problem, Prompts, Rollout, Verdict


class Responses(NamedTuple):
    """A rollout on the host, with its text; B = Q * G rows."""

    problems: Sequence[Problem]  # Q
    prompts: Prompts
    rollout: Rollout
    texts: list[str]  # B, special tokens left out
    openings: list[str]  # Q, what the prompt began of the response: "<think>" or nothing

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


def join_responses(turns: Sequence[Responses]) -> Responses:
    """One after the other."""
    if len(turns) == 1:
        return turns[0]
    return Responses(
        [problem for turn in turns for problem in turn.problems],
        Prompts(*(np.concatenate(arrays) for arrays in zip(*(turn.prompts for turn in turns), strict=True))),
        Rollout(*(np.concatenate(arrays) for arrays in zip(*(turn.rollout for turn in turns), strict=True))),
        [text for turn in turns for text in turn.texts],
        [opening for turn in turns for opening in turn.openings],
    )


def make_rollout(parts: Actor | Parts, sampling: Sampling, max_prompt: int) -> Callable[..., Responses]:
    """Returns the function (decode params, Q problems, Draw of ints) -> Responses.

    Q must be the same in every call, and a multiple of the replicas: another size is another program.
    """
    scalar = NamedSharding(parts.mesh, PartitionSpec())
    sample = make_sampler(parts.model, sampling, out_shardings=rollout_shardings(parts))

    def rollout(params, problems: Sequence[Problem], draw: Draw) -> Responses:
        prompts = encode_prompts(problems, parts.tokenizer, parts.template, max_prompt)
        on_device = to_device(prompts, prompt_shardings(parts))
        numbers = to_device(Draw(*(np.int32(number) for number in draw)), scalar)
        result = to_host(sample(params, on_device, numbers))
        texts = [
            parts.tokenizer.decode(tokens[mask], skip_special=True)
            for tokens, mask in zip(result.response, result.response_mask, strict=True)
        ]
        openings = [parts.template.opening(problem.problem, parts.tokenizer) for problem in problems]
        return Responses(problems, prompts, result, texts, openings)

    rollout.sample = sample  # so that a test can count its compilations
    return rollout


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


def build_sampling(parts: Actor | Parts, rollout_config) -> Sampling:
    """The sampler's settings for a rollout to learn from."""
    return Sampling(
        group_size=rollout_config.group_size, max_response=rollout_config.max_response, stop_ids=parts.tokenizer.stop_ids,
        pad_id=parts.tokenizer.pad_id, temperature=rollout_config.temperature, top_p=rollout_config.top_p,
        top_k=rollout_config.top_k,
    )  # fmt: skip
