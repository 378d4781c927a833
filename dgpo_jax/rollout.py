"""Problems in, checked responses out: the path from text to tokens to text that training and evaluation share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.build import Parts, prompt_shardings, rollout_shardings
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

    def first(self, problems: int) -> "Responses":
        """Those to the first so many problems."""
        prompts = Prompts(*(array[:problems] for array in self.prompts))
        rows = problems * self.group_size
        rollout = Rollout(*(array[:rows] for array in self.rollout))
        return Responses(self.problems[:problems], prompts, rollout, self.texts[:rows], self.openings[:problems])

    def prompt_ends(self) -> list[str]:
        """B texts: "<think>" where the prompt opened it for the model, as R1-Distill's template does, else ""."""
        return [self.openings[row // self.group_size] for row in range(len(self.texts))]

    def answers(self) -> list[tuple[str, str]]:
        """(reference answer, response) for every row, as the verifier takes them; the opening is the response's."""
        return [
            (self.problems[row // self.group_size].answer, opening + text)
            for row, (opening, text) in enumerate(zip(self.prompt_ends(), self.texts, strict=True))
        ]


def make_rollout(parts: Parts, sampling: Sampling, max_prompt: int) -> Callable[..., Responses]:
    """Returns the function (decode params, Q problems, Draw of ints) -> Responses.

    Q must be the same in every call, and a multiple of the replicas: another size is another program.
    """
    sample = make_sampler(parts.model, sampling, out_shardings=rollout_shardings(parts))

    def rollout(params, problems: Sequence[Problem], draw: Draw) -> Responses:
        prompts = encode_prompts(problems, parts.tokenizer, parts.template, max_prompt)
        on_device = to_device(prompts, prompt_shardings(parts))
        numbers = to_device(Draw(*(np.int32(number) for number in draw)), parts.shardings.scalar)
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


def build_sampling(parts: Parts, rollout_config, *, group_size: int, temperature: float) -> Sampling:
    """The sampler's settings: those of the rollout, but for these two."""
    return Sampling(
        group_size=group_size, max_response=rollout_config.max_response, stop_ids=parts.tokenizer.stop_ids,
        pad_id=parts.tokenizer.pad_id, temperature=temperature, top_p=rollout_config.top_p, top_k=rollout_config.top_k,
    )  # fmt: skip
