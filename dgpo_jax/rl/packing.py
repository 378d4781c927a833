"""From responses of uneven length to full rows: which update, which row, which slots. Host numpy.

A packed row holds several whole sequences, each a prompt and its response, told apart by `segment`. Every microbatch
has the same shape, so that the update compiles once; what is left over is padding with segment 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.types import Prompts, Rollout, TrainBatch


class Example(NamedTuple):
    """One sequence to learn from."""

    prompt: np.ndarray  # i32[prompt length]
    response: np.ndarray  # i32[response length]
    logprobs: np.ndarray  # f32[response length], the sampler's
    advantage: float


def split_groups(groups: int, updates: int, seed: int, iteration: int) -> np.ndarray:
    """Which groups go into which update: whole groups, shuffled by (seed, iteration) and nothing else.

    Returns:
        i64[updates, groups / updates]; independent of devices and of lengths, so that the split never moves.
    """
    order = np.random.default_rng([seed, iteration, 0x59]).permutation(groups)
    return order.reshape(updates, -1)


def to_examples(prompts: Prompts, rollout: Rollout, advantages, rows: Sequence[int]) -> list[Example]:
    """Cuts the padding off some rows of a rollout.

    Args:
        advantages: f32[B].
        rows: which of the B responses, in this order.
    """
    group_size = len(rollout.response) // len(prompts.tokens)
    return [
        Example(
            prompts.tokens[row // group_size][prompts.mask[row // group_size]],
            rollout.response[row][rollout.response_mask[row]],
            rollout.logprobs[row][rollout.response_mask[row]],
            float(advantages[row]),
        )
        for row in rows
    ]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each length, longest first, into the first row it fits in.

    Returns:
        Per row the indices it holds. At most 11/9 of the fewest possible rows, plus one (first-fit decreasing).
    Raises:
        ValueError: a length above the capacity.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in np.argsort(-np.asarray(lengths, int), kind="stable"):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sequence of {length} tokens does not fit a row of {capacity}; raise update.tokens_per_row.")
        row = next((row for row, room in enumerate(free) if room >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(int(index))
        free[row] -= length
    return rows


def pack(examples: Sequence[Example], *, rows: int, tokens_per_row: int, pad_id: int = 0) -> list[TrainBatch]:
    """Packs sequences into microbatches of one fixed shape.

    Args:
        rows: N, rows of one microbatch over all devices.
        tokens_per_row: T.
    Returns:
        As many TrainBatches [N, T] as it takes, the last one filled up with empty rows; none for no examples.
        `old_logprobs` are the sampler's.
    """
    layout = first_fit([len(example.prompt) + len(example.response) for example in examples], tokens_per_row)
    batches = []
    for start in range(0, len(layout), rows):
        batch = empty_batch(rows, tokens_per_row, pad_id)
        for row, members in enumerate(layout[start : start + rows]):
            _fill_row(batch, row, [examples[index] for index in members])
        batches.append(batch)
    return batches


def empty_batch(rows: int, tokens_per_row: int, pad_id: int = 0) -> TrainBatch:
    """A TrainBatch [rows, tokens_per_row] of padding."""
    shape = (rows, tokens_per_row)
    return TrainBatch(
        tokens=np.full(shape, pad_id, np.int32),
        segment=np.zeros(shape, np.int32),
        position=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        old_logprobs=np.zeros(shape, np.float32),
        advantages=np.zeros(shape, np.float32),
    )


def _fill_row(batch: TrainBatch, row: int, examples: Sequence[Example]) -> None:
    start = 0
    for segment, example in enumerate(examples, start=1):
        middle = start + len(example.prompt)
        end = middle + len(example.response)
        batch.tokens[row, start:middle] = example.prompt
        batch.tokens[row, middle:end] = example.response
        batch.segment[row, start:end] = segment
        batch.position[row, start:end] = np.arange(end - start)
        batch.loss_mask[row, middle:end] = True
        batch.old_logprobs[row, middle:end] = example.logprobs
        batch.advantages[row, middle:end] = example.advantage
        start = end
