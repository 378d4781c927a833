"""From responses of uneven length to full rows: which update, which row, which slots. Host numpy.

A packed row holds several whole sequences, each a prompt and its response, told apart by `segment`. Every microbatch
has the same shape, so that the update compiles once; what is left over is padding with segment 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.rl.experience import group_size
from dgpo_jax.types import Experience, TrainBatch

NUMBERS = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "advantages", "weights", "supervised")  # of a TrainBatch, f32


class Example(NamedTuple):
    """One sequence to learn from; a number stands for every token of its response."""

    prompt: np.ndarray  # i32[prompt length]
    response: np.ndarray  # i32[response length]
    sampler_logprobs: np.ndarray | float  # f32[response length]
    old_logprobs: np.ndarray | float  # f32[response length]
    advantage: float
    weight: float  # of each token's policy loss
    supervised: float = 0.0  # of each token's -logp


class Place(NamedTuple):
    """Where a sequence lies in the microbatches."""

    batch: int
    row: int
    segment: int  # 1.. within the row
    start: int  # slot of its first prompt token


def split_groups(groups: int, updates: int, seed: int, iteration: int) -> np.ndarray:
    """Which groups go into which update: whole groups, shuffled by (seed, iteration) and nothing else.

    Returns:
        i64[updates, groups / updates]; independent of devices and of lengths, so that the split never moves.
    """
    order = np.random.default_rng([seed, iteration, 0x59]).permutation(groups)
    return order.reshape(updates, -1)


def to_examples(experience: Experience, rows: Sequence[int], advantages, weights, supervised) -> list[Example]:
    """Cuts the padding off some responses.

    Args:
        rows: which of the B responses, in this order.
        advantages, weights, supervised: f32[B] each.
    """
    prompts, rollout, size = experience.prompts, experience.rollout, group_size(experience)
    examples = []
    for row in rows:
        group, mask = row // size, rollout.response_mask[row]
        examples.append(
            Example(
                prompts.tokens[group][prompts.mask[group]], rollout.response[row][mask], rollout.logprobs[row][mask],
                experience.old_logprobs[row][mask], float(advantages[row]), float(weights[row]), float(supervised[row]),
            )
        )  # fmt: skip
    return examples


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


def lay_out(lengths: Sequence[int], *, rows: int, tokens_per_row: int) -> list[Place]:
    """Where each sequence goes, by its length alone."""
    places: dict[int, Place] = {}
    for row, members in enumerate(first_fit(lengths, tokens_per_row)):
        start = 0
        for segment, index in enumerate(members, start=1):
            places[index] = Place(row // rows, row % rows, segment, start)
            start += lengths[index]
    return [places[index] for index in range(len(lengths))]


def pack(examples: Sequence[Example], *, rows: int, tokens_per_row: int, pad_id: int = 0) -> list[TrainBatch]:
    """Packs sequences into microbatches of one fixed shape.

    Args:
        rows: N, rows of one microbatch over all devices.
        tokens_per_row: T.
    Returns:
        As many TrainBatches [N, T] as it takes, the last one filled up with empty rows; none for no examples.
    """
    places = lay_out(_lengths(examples), rows=rows, tokens_per_row=tokens_per_row)
    count = 1 + max((place.batch for place in places), default=-1)
    batches = [empty_batch(rows, tokens_per_row, pad_id) for _ in range(count)]
    for example, place in zip(examples, places, strict=True):
        _write(batches[place.batch], place, example)
    return batches


def unpack(arrays: Sequence[np.ndarray], examples: Sequence[Example], *, rows: int, tokens_per_row: int) -> list[np.ndarray]:
    """The other way round: what `arrays` [N, T], one per microbatch, hold for the response tokens of each example."""
    places = lay_out(_lengths(examples), rows=rows, tokens_per_row=tokens_per_row)
    return [
        np.asarray(arrays[place.batch])[place.row, _response_slots(place, example)]
        for example, place in zip(examples, places, strict=True)
    ]


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.prompt) + len(example.response) for example in examples]


def _response_slots(place: Place, example: Example) -> slice:
    first = place.start + len(example.prompt)
    return slice(first, first + len(example.response))


def empty_batch(rows: int, tokens_per_row: int, pad_id: int = 0) -> TrainBatch:
    """A TrainBatch [rows, tokens_per_row] of padding."""
    shape = (rows, tokens_per_row)
    return TrainBatch(
        tokens=np.full(shape, pad_id, np.int32),
        segment=np.zeros(shape, np.int32),
        position=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        **{name: np.zeros(shape, np.float32) for name in NUMBERS},
    )


def _write(batch: TrainBatch, place: Place, example: Example) -> None:
    row, response = place.row, _response_slots(place, example)
    whole = slice(place.start, response.stop)
    batch.tokens[row, place.start : response.start] = example.prompt
    batch.tokens[row, response] = example.response
    batch.segment[row, whole] = place.segment
    batch.position[row, whole] = np.arange(response.stop - place.start)
    batch.loss_mask[row, response] = True
    batch.sampler_logprobs[row, response] = example.sampler_logprobs
    batch.old_logprobs[row, response] = example.old_logprobs
    batch.advantages[row, response] = example.advantage
    batch.weights[row, response] = example.weight
    batch.supervised[row, response] = example.supervised
