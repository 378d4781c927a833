"""The data that flows through a run: plain tuples that host code and device code both understand.

They are NamedTuples, so JAX treats them as pytrees, and this module imports no JAX, so the answer checkers
can use them too. `Array` below means numpy on the host and `jax.Array` on the device; arrays cross between the
two only in `sharding.to_device` and `sharding.to_host`.

Axis letters used everywhere: Q prompts per iteration, G group size, B = Q * G responses (row q * G + g), P prompt
slots, R response slots, N packed rows, T tokens per packed row, L layers, D width, K key heads, M query heads per
key head, H head width, F feed-forward width, S cache slots, V vocabulary.
"""

from typing import Any, NamedTuple

Array = Any


class Problem(NamedTuple):
    """One question with a checkable answer."""

    id: str  # unique within its source
    problem: str  # the question, as text
    answer: str  # the reference answer; empty only where `checker` does not read it
    source: str  # which set it comes from
    solution: str = ""  # a worked solution, for supervised warm starts
    checker: str = "math"  # who judges a response: one of CHECKERS
    tests: str = ""  # JSON, what "code" or "gym" judges by; see rewards/code.py and rewards/gym.py
    tolerance: float = 1e-6  # relative distance at which a rounded decimal is still right; for "math"


CHECKERS = ("math", "code", "gym")


class Verdict(NamedTuple):
    """What the checker says about one response."""

    status: str  # one of STATUSES
    extracted: str | None  # the answer, or the program, found in the response; None where there was none
    share: float | None = None  # of a graded answer: tests passed, or reasoning-gym's score, 0 to 1; None = right or not

    @property
    def correct(self) -> bool:
        """True only for a checked, wholly right answer."""
        return self.status == "correct"

    @property
    def score(self) -> float:
        """0 to 1: how right it is."""
        return float(self.correct) if self.share is None else self.share


# Only the first two are judgements of the answer; the others are counted apart, so that a broken checker shows.
STATUSES = ("correct", "wrong", "no_answer", "unparsable", "timed_out", "crashed")


class Prompts(NamedTuple):
    """Prompts padded on the left, so that the last slot of every row is its last token."""

    tokens: Array  # i32[Q, P]
    mask: Array  # bool[Q, P], True = real


class Rollout(NamedTuple):
    """Responses padded on the right; row q * G + g is sample g of prompt q."""

    response: Array  # i32[B, R]
    response_mask: Array  # bool[B, R], True = sampled, the stop token included
    logprobs: Array  # f32[B, R], of log_softmax(logits / temperature), never renormalised by top-p or top-k
    truncated: Array  # bool[B], True = ran out of slots before a stop token


class Experience(NamedTuple):
    """Checked responses by whole groups, on the host: what an iteration learns from, or a later one will."""

    prompts: Prompts  # [Q, P]
    rollout: Rollout  # [B, R]
    old_logprobs: Array  # f32[B, R], of the weights that sampled; NaN where the trainer has yet to compute them
    scores: Array  # f32[B], 0 to 1 as the checker says, 1 = right; 0 without the tags asked for
    rewards: Array  # f32[B]
    iteration: Array  # i32[Q], in which the group was sampled


class TrainBatch(NamedTuple):
    """Several sequences packed into each row; attention never crosses a segment.

    The loss of an update is a sum over the tokens of all its batches: `weights` times the policy loss plus
    `supervised` times -logp. Whatever it is divided by is in these two already.
    """

    tokens: Array  # i32[N, T]
    segment: Array  # i32[N, T], 0 = padding, 1.. = the sequences of the row
    position: Array  # i32[N, T], counts from 0 within a segment
    loss_mask: Array  # bool[N, T], True where the *token at this slot* was sampled
    sampler_logprobs: Array  # f32[N, T], of the token at this slot, by the sampler
    old_logprobs: Array  # f32[N, T], by the trainer with the weights that sampled; NaN = yet to be computed
    ref_logprobs: Array  # f32[N, T], by the weights that the run started from; 0 where no KL is asked for
    advantages: Array  # f32[N, T]
    weights: Array  # f32[N, T], of the token's policy loss
    supervised: Array  # f32[N, T], of the token's -logp


class TrainState(NamedTuple):
    """What an update reads and writes."""

    update: Array  # i32[], optimizer steps taken
    params: Any  # nested dict of f32 arrays
    opt_state: Any  # optax's state


class Quantized(NamedTuple):
    """Numbers in eight bits."""

    values: Array  # i8, -127 to 127
    scale: Array  # f32, of the same rank: what a step of `values` is worth, 1 in the dimensions that share it


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one sequence a row, each token in the slot of its position.

    Each is an array dtype[L, B, K, S, H], or a Quantized with a scale for every token and key head, f32[L, B, K, S, 1].
    """

    key: Array | Quantized  # rotary embedding applied
    value: Array | Quantized
