"""From responses of uneven length to full rows: which update, which row, which slots. Host numpy.

A packed row holds several whole sequences, each a prompt and its response, told apart by `segment`. Every microbatch
has the same shape, so that the update compiles once; what is left over is padding with segment 0.

Matrix products cost every device the same, whatever its rows hold. Attention costs the square of a sequence's length and
the vocabulary's logits are made of response tokens only, so these two are what is dealt out evenly: the devices wait for
the slowest in each microbatch.
"""

from bisect import bisect_left, insort
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dgpo_jax.rl.experience import group_size, lengths
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


class Shape(NamedTuple):
    """Of a microbatch, and what its sequences cost."""

    rows: int  # N, over all devices
    tokens_per_row: int  # T
    devices: int = 1  # that share the rows evenly; divides them
    attention: float = 0.0  # what it costs that one token may attend another, in response tokens' logits


class Place(NamedTuple):
    """Where a sequence lies in the microbatches."""

    batch: int
    row: int
    segment: int  # 1.. within the row
    start: int  # slot of its first prompt token


class Layout(NamedTuple):
    """Where all sequences of an update go."""

    shape: Shape
    places: list[Place]  # one for each sequence
    batches: int  # microbatches
    tokens: int  # in all of them, padding left out
    costs: np.ndarray  # f64[batches, devices], in response tokens' logits

    @property
    def slots(self) -> int:
        """For tokens and padding, in all microbatches."""
        return self.batches * self.shape.rows * self.shape.tokens_per_row


def split_groups(groups: int, updates: int, seed: int, iteration: int) -> np.ndarray:
    """Which groups go into which update: whole groups, shuffled by (seed, iteration) and nothing else.

    Returns:
        i64[updates, groups / updates]; independent of devices and of lengths, so that the split never moves.
    """
    order = np.random.default_rng([seed, iteration, 0x59]).permutation(groups)
    return order.reshape(updates, -1)


def to_examples(experience: Experience, rows: Sequence[int], advantages, weights, supervised) -> list[Example]:
    """Cuts the padding off some responses: views of their arrays, not copies.

    Args:
        rows: which of the B responses, in this order.
        advantages, weights, supervised: f32[B] each.
    """
    prompts, rollout, size = experience.prompts, experience.rollout, group_size(experience)
    slots, length = prompts.mask.shape[1], lengths(experience)
    first = slots - prompts.mask.sum(axis=1)  # prompts are padded on the left, responses on the right
    examples = []
    for row in rows:
        group, end = row // size, length[row]
        examples.append(
            Example(
                prompts.tokens[group, first[group] :], rollout.response[row, :end], rollout.logprobs[row, :end],
                experience.old_logprobs[row, :end], float(advantages[row]), float(weights[row]), float(supervised[row]),
            )
        )  # fmt: skip
    return examples


def lay_out(examples: Sequence[Example], shape: Shape) -> Layout:
    """Where each sequence goes: into as few microbatches as whole sequences allow, the cost of each shared evenly.

    Raises:
        ValueError: a sequence that is longer than a row.
    """
    responses = np.array([len(example.response) for example in examples], np.int64)
    lengths = responses + np.array([len(example.prompt) for example in examples], np.int64)
    cost = responses + shape.attention * lengths.astype(float) ** 2
    row = best_fit(lengths, shape.tokens_per_row)
    batches = -(-(row.max(initial=-1) + 1) // shape.rows)
    spread = spread_out(lengths, cost, batches * shape.rows, shape.tokens_per_row)
    row = row if spread is None else spread
    row_cost = np.bincount(row, cost, minlength=batches * shape.rows)
    row = deal(row_cost, shape.rows, shape.devices)[row]
    places = _line_up(lengths, row, shape.rows)
    costs = np.bincount(row // (shape.rows // shape.devices), cost, minlength=batches * shape.devices)
    return Layout(shape, places, int(batches), int(lengths.sum()), costs.reshape(-1, shape.devices))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Puts each length, longest first, into the fullest row that it fits in.

    Returns:
        i64[n], the row of each. At most 11/9 of the fewest possible rows, plus one (best-fit decreasing).
    Raises:
        ValueError: a length above the capacity.
    """
    if (longest := lengths.max(initial=0)) > capacity:
        raise ValueError(f"a sequence of {longest} tokens does not fit a row of {capacity}; raise update.tokens_per_row.")
    result, rows = np.empty(len(lengths), np.int64), 0
    room: list[tuple[int, int]] = []  # (slots left, row), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (capacity, rows)
        rows = max(rows, row + 1)
        insort(room, (left - length, row))
        result[index] = row
    return result


def spread_out(lengths: np.ndarray, cost: np.ndarray, rows: int, capacity: int) -> np.ndarray | None:
    """Puts each sequence, the costliest first, into the row with the lowest cost so far that it fits in.

    Returns:
        i64[n], the row of each; None if one fits nowhere, as it happens where the rows are nearly full.
    """
    result, sums, free = np.empty(len(lengths), np.int64), np.zeros(rows), np.full(rows, capacity)
    for index in np.lexsort((-lengths, -cost)).tolist():
        row = int(np.where(free >= lengths[index], sums, np.inf).argmin())
        if free[row] < lengths[index]:
            return None
        result[index] = row
        sums[row] += cost[index]
        free[row] -= lengths[index]
    return result


def deal(cost: np.ndarray, rows: int, devices: int) -> np.ndarray:
    """Orders rows so that the devices have about the same to do in each microbatch.

    Rows of like cost share a microbatch, and are dealt to its devices to and fro.

    Args:
        cost: f64[microbatches * rows].
        rows: of a microbatch; device d has rows d * rows / devices to (d + 1) * rows / devices of it.
    Returns:
        i64[microbatches * rows], the new place of each row.
    """
    turn, device = np.divmod(np.arange(rows), devices)
    device = np.where(turn % 2, devices - 1 - device, device)
    order = np.argsort(-cost, kind="stable").reshape(-1, rows)  # of each microbatch, the costliest row first
    places = np.arange(len(order))[:, None] * rows + (device * (rows // devices) + turn)[None, :]
    result = np.empty(len(cost), np.int64)
    result[order] = places
    return result


def _line_up(lengths: np.ndarray, row: np.ndarray, rows: int) -> list[Place]:
    """The sequences of each row one behind the other, the longest first."""
    order = np.lexsort((-lengths, row))
    row, ends = row[order], np.cumsum(lengths[order])
    first = np.searchsorted(row, row)  # where in `order` each one's row begins
    starts = ends - lengths[order]
    columns = np.empty((4, len(order)), np.int64)
    columns[:, order] = (row // rows, row % rows, np.arange(len(order)) - first + 1, starts - starts[first])
    return [Place(*column) for column in columns.T.tolist()]


def pack(examples: Sequence[Example], *, rows: int, tokens_per_row: int, pad_id: int = 0) -> list[TrainBatch]:
    """Packs sequences into microbatches of one fixed shape, for one device.

    Returns:
        As many TrainBatches [rows, tokens_per_row] as it takes; none for no examples.
    """
    return list(fill(examples, lay_out(examples, Shape(rows, tokens_per_row)), pad_id=pad_id))


def fill(
    examples: Sequence[Example], layout: Layout, *, pad_id: int = 0, rows: Container[int] | None = None
) -> Iterator[TrainBatch]:
    """The microbatches of a layout, each made when it is asked for: the devices work on one while the next is filled.

    Args:
        rows: of a microbatch, those to fill; the others stay padding. None = all.
    """
    members: list[list[int]] = [[] for _ in range(layout.batches)]
    for index, place in enumerate(layout.places):
        if rows is None or place.row in rows:
            members[place.batch].append(index)
    for indices in members:
        batch = empty_batch(layout.shape.rows, layout.shape.tokens_per_row, pad_id)
        for index in indices:
            _write(batch, layout.places[index], examples[index])
        yield batch


def unpack(arrays: Sequence[np.ndarray], examples: Sequence[Example], layout: Layout) -> list[np.ndarray]:
    """The other way round: what `arrays` [N, T], one per microbatch, hold for the response tokens of each example."""
    return [
        np.asarray(arrays[place.batch])[place.row, _response_slots(place, example)]
        for example, place in zip(examples, layout.places, strict=True)
    ]


def packing_metrics(layouts: Sequence[Layout]) -> dict[str, float]:
    """How well an iteration's updates are packed; empty if there was nothing to pack."""
    slots, costs = sum(layout.slots for layout in layouts), np.concatenate([layout.costs for layout in layouts])
    if not slots:
        return {}
    return {
        "update/packing_efficiency": sum(layout.tokens for layout in layouts) / slots,
        # The slowest device's cost in each microbatch to that of all devices on average: 1 = nobody waits.
        "update/imbalance": float(costs.max(axis=1).sum() / costs.mean(axis=1).sum()),
    }


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
    batch.position[row, whole] = np.arange(response.stop - place.start, dtype=np.int32)
    batch.loss_mask[row, response] = True
    batch.sampler_logprobs[row, response] = example.sampler_logprobs
    batch.old_logprobs[row, response] = example.old_logprobs
    batch.advantages[row, response] = example.advantage
    batch.weights[row, response] = example.weight
    batch.supervised[row, response] = example.supervised
