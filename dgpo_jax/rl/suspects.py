"""Which sequences made an update not finite, so that somebody can look at them. Host numpy.

The device marks tokens while it computes the gradient (`update.mark_tokens`); here a mark becomes a sequence. Attention multiplies
what a token may not see by 0, and 0 times NaN is NaN: sequences that share a packed row with the one at fault may be
marked with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dgpo_jax.rl.experience import group_size
from dgpo_jax.rl.packing import Example, Layout, Place, unpack
from dgpo_jax.types import Experience

LOGPROB, LOSS = 1, 2  # bits of a token's mark
NAMES = {LOGPROB: "log-probability", LOSS: "loss"}
GIVEN = ("sampler_logprobs", "old_logprobs", "advantage", "weight", "supervised")  # numbers of an Example that go into the loss


class Marks(NamedTuple):
    """What tells whether a microbatch was finite."""

    tokens: Any  # u8[N, T], bits LOGPROB and LOSS; 0 where a token is sound or in no loss
    grad_norm: Any  # f32[], of the gradient summed up to and with this microbatch


class Suspect(NamedTuple):
    """A sequence of an update that may be what was not finite."""

    index: int  # of its Example
    not_finite: list[str]  # what was not: of its tokens, else of the gradient that it is part of
    tokens: np.ndarray  # i64[n], which response tokens are marked; empty if none is


def find_suspects(examples: Sequence[Example], layout: Layout, marks: Sequence[Marks]) -> list[Suspect]:
    """The sequences to look at, of one skipped update.

    Those with marked tokens, and all of the microbatch with which the summed gradient ceased to be finite if none of its
    tokens is marked. What is behind it in the sum cannot be told from it. All there are if even the sum was finite.

    Args:
        marks: of each microbatch, on the host.
    """
    bits = unpack([mark.tokens for mark in marks], examples, layout)
    overflown = next((number for number, mark in enumerate(marks) if not np.isfinite(mark.grad_norm)), None)
    found = []
    for index, place in enumerate(layout.places):
        names = [name for bit, name in NAMES.items() if (bits[index] & bit).any()]
        if place.batch == overflown and not marks[overflown].tokens.any():
            names = ["gradient of the microbatch"]
        if names:
            found.append(Suspect(index, names, np.flatnonzero(bits[index])))
    return found or [Suspect(index, ["sum of the loss"], np.array([], int)) for index in range(len(examples))]


def suspect_rows(
    experience: Experience, rows: Sequence[int], examples: Sequence[Example], layout: Layout, marks: Sequence[Marks],
    decode: Callable, old_logprobs: Sequence[np.ndarray] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The suspects of one skipped update as lines of nonfinite/iteration_000012.jsonl.

    Args:
        rows: which of the B responses each example is.
        marks: of each microbatch.
        decode: token ids -> text.
        old_logprobs: f32[N, T] of each microbatch, as the update saw them; None = the examples'.
    """
    if old_logprobs is not None:
        seen = unpack(old_logprobs, examples, layout)
        examples = [example._replace(old_logprobs=values) for example, values in zip(examples, seen, strict=True)]
    return [
        describe(suspect, examples[suspect.index], layout.places[suspect.index], int(rows[suspect.index]), experience, decode)
        for suspect in find_suspects(examples, layout, marks)
    ]


def describe(suspect: Suspect, example: Example, place: Place, row: int, experience: Experience, decode: Callable) -> dict[str, Any]:
    """One line. What is counted in it begins at 1, but tokens, which begin at 0 with the response's first."""
    group, sample = divmod(row, group_size(experience))
    given = [name for name in GIVEN if not np.isfinite(getattr(example, name)).all()]
    return {
        "not_finite": suspect.not_finite,
        "given_not_finite": given,  # what was broken before this forward pass
        "tokens_not_finite": len(suspect.tokens),
        "first_token_not_finite": int(suspect.tokens[0]) if len(suspect.tokens) else None,
        "microbatch": place.batch + 1,
        "row": place.row + 1,
        "group": group + 1,
        "sample": sample + 1,
        "sampled_in_iteration": int(experience.iteration[group]),
        "reward": float(experience.rewards[row]),
        "score": float(experience.scores[row]),
        "advantage": example.advantage,
        "weight": example.weight,
        "supervised": example.supervised,
        "sampler_logprobs": extremes(example.sampler_logprobs),
        "old_logprobs": extremes(example.old_logprobs),
        "prompt": decode(example.prompt),
        "response": decode(example.response),
        "prompt_tokens": example.prompt.tolist(),
        "response_tokens": example.response.tolist(),
    }


def extremes(numbers) -> list[float] | None:
    """[smallest, largest] of those that are finite; None if none is."""
    finite = np.atleast_1d(numbers)[np.isfinite(np.atleast_1d(numbers))]
    return [float(finite.min()), float(finite.max())] if finite.size else None
