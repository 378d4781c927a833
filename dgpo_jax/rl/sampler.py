"""Sampling responses: slots, a queue of responses that wait for one, and a device that decodes a chunk of tokens at a time.

    prompts ──▶ prefill ──▶ insert into free slots ──▶ decode a chunk ──▶ responses that ended, to whoever wants them
                                   ▲                         │
                                   └──── the slots they had ─┘

A response that ends hands its slot to the next that waits. When none waits any more and those left fit into half the slots,
they move together, and a program for that many slots takes over. So the cost follows the tokens sampled, and not the
longest response. None of this changes a response: each token is drawn with a number that is named after it (drawing.py)
from logits that depend on its own row. Slots, chunks, other rows and replicas move these by rounding at most; where two tokens
are within rounding of the border, another one may be drawn.

With several replicas each has its own share of the prompts and its own slots, and decodes at its own pace.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgpo_jax.ahead import Program
from dgpo_jax.rl.desk import Desk
from dgpo_jax.rl.drawing import Draw, Sampling
from dgpo_jax.rl.slots import Chunk, Moves, Orders, Placement, Slots, decode, empty_slots, insert, move
from dgpo_jax.sharding import abstract, to_device, to_host
from dgpo_jax.types import KVCache, Prompts, Rollout

CHUNK = 64  # tokens decoded between two looks at what has ended
PREFILL_TOKENS = 16_384  # prompt slots of one prefill on each replica, unless a single prompt is more
SIZES = 4  # programs of `decode` at most: for all slots, half of them, a quarter, ...
FEWEST_ROWS = 4  # of the smallest, on each replica
REFILL_SHARE = 8  # decoding stops early for waiting responses when this fraction of the slots, 1/8, is free


class Sampled(NamedTuple):
    """What sampling gives, on the host."""

    rollout: Rollout
    row_steps: int  # rows times steps of the decoding loops, in which as many tokens were drawn as the rollout has


def make_sampler(model, sampling: Sampling, *, slots: int, max_prompt: int, int8_cache: bool = False) -> "Sampler":
    """A sampler for a model and its mesh.

    Args:
        model: has `mesh`, `make_cache`, `prefill`, `decode`, `unembedding`; see models/decoding.py.
        slots: responses decoded at once, over all replicas; rounded up to a multiple of these.
        max_prompt: P, tokens of the longest prompt.
        int8_cache: keep keys and values in eight bits.
    """
    return Sampler(model, sampling, slots, max_prompt, int8_cache)


class Sampler:
    """See `make_sampler`. The programs compile on first use, or ahead of it through `programs`."""

    def __init__(self, model, sampling: Sampling, slots: int, max_prompt: int, int8_cache: bool):
        self.sampling = sampling
        self.placement = placement = Placement(model.mesh)
        self.replicas = placement.replicas
        self.rows = -(-slots // self.replicas)  # C, slots of each replica
        self.held = max(1, min(-(-self.rows // sampling.group_size), PREFILL_TOKENS // max_prompt))  # prompts of a prefill
        self.sizes = sizes_of(self.rows, sampling.max_response)
        chunk = min(CHUNK, sampling.max_response)
        start = functools.partial(empty_slots, model, self.rows * self.replicas, max_prompt + sampling.max_response, int8_cache)
        self.shapes = shapes = abstract_arrays(model, start, self.replicas, self.rows, self.held, max_prompt)
        self._start = jax.jit(start, out_shardings=placement.shardings(shapes.slots))
        self._prefill = placement.program(model.prefill, (None, shapes.tokens, shapes.length), shapes.prompts)
        self._insert = placement.program(insert, (shapes.slots, shapes.prompts, shapes.orders, None), shapes.slots, donate=(0,))
        self._move = placement.program(move, (shapes.slots, shapes.moves), shapes.slots, donate=(0,))
        self._decode = {}
        for rows in self.sizes:
            function = functools.partial(decode, model, rows=rows, chunk=chunk, sampling=sampling)
            outputs = (shapes.slots, Chunk(*[shapes.length] * len(Chunk._fields)))
            self._decode[rows] = placement.program(function, (None, shapes.slots, None), outputs, donate=(1,))

    def programs(self, params) -> list[Program]:
        """What sampling compiles, given abstract decode params with shardings."""
        placed = Shapes(*(abstract(tree, self.placement.shardings(tree)) for tree in self.shapes))
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.placement.whole)
        draw, target = Draw(*[number] * len(Draw._fields)), number
        return [
            Program("start", "rollout", self._start, ()),
            Program("prefill", "rollout", self._prefill, (params, placed.tokens, placed.length)),
            Program("insert", "rollout", self._insert, (placed.slots, placed.prompts, placed.orders, draw)),
            *([Program("move", "rollout", self._move, (placed.slots, placed.moves))] if len(self.sizes) > 1 else []),
            *(Program(f"decode {rows}", "rollout", function, (params, placed.slots, target)) for rows, function in self._decode.items()),
        ]

    def __call__(
        self, params, prompts: Prompts, draw: Draw, on_finished: Callable[[int, np.ndarray], object] | None = None,
        on_chunk: Callable[[], object] = lambda: None,
    ) -> Sampled:  # fmt: skip
        """Samples G responses to each of the prompts.

        Args:
            params: decode params.
            prompts: Q of them on the host; any number.
            draw: ints.
            on_finished: called with (response number, its tokens) as soon as one has ended, while others are sampled.
            on_chunk: called before each chunk of tokens; what it raises ends the sampling.
        """
        size = self.sampling.group_size
        desk = Desk(len(prompts.tokens), size, self.replicas, self.rows, self.held)
        sheet = Sheet(len(prompts.tokens) * size, self.sampling)
        aligned, length = align_left(prompts)
        numbers = to_device(Draw(*(np.int32(number) for number in draw)), self.placement.whole)
        slots, rows, row_steps = self._start(), self.rows, 0
        while desk.waiting or desk.most_taken:
            while desk.wants_slots:
                begun = desk.seat()
                if not any(begun):
                    chosen = desk.next_prompts().reshape(-1)
                    held = self._prefill(params, self._put(aligned[chosen]), self._put(length[chosen]))
                    continue
                orders = make_orders(begun, self.rows, aligned, length, size, draw)
                slots = self._insert(slots, held, self._put(orders), numbers)
            if not desk.waiting:
                rows, moves = self._shrink(desk, rows)
                slots = self._move(slots, self._put(moves)) if moves else slots
            on_chunk()
            slots, chunk = self._decode[rows](params, slots, to_device(self._target(desk, rows), self.placement.whole))
            chunk = to_host(chunk)
            row_steps += rows * int(chunk.steps.sum())
            sheet.write(desk.seats[:, :rows].reshape(-1), chunk)
            for response in desk.rise(rows, chunk.active.reshape(self.replicas, rows)).tolist():
                if on_finished is not None:
                    on_finished(response, sheet.tokens(response))
        return Sampled(sheet.rollout(), row_steps)

    def _put(self, tree):
        return to_device(tree, self.placement.shardings(tree))

    def _shrink(self, desk: Desk, rows: int) -> tuple[int, Moves | None]:
        """The smallest number of slots that holds those left, and the moves that make it do."""
        smaller = min(size for size in self.sizes if size >= desk.most_taken)
        if smaller >= rows:
            return rows, None
        moves = desk.gather(smaller)
        return smaller, make_moves(moves, self.rows) if any(moves) else None

    def _target(self, desk: Desk, rows: int) -> np.int32:
        """How few active responses should end a chunk early, so that their slots are given away or given up."""
        if self.replicas > 1:
            return np.int32(0)  # a replica that stopped early would wait for the others
        if desk.waiting:
            return np.int32(rows - -(-rows // REFILL_SHARE))
        return np.int32(max((size for size in self.sizes if size < rows), default=0))


class Shapes(NamedTuple):
    """The arrays that go to and come from the programs, over all replicas; trees of jax.ShapeDtypeStruct."""

    slots: Slots
    prompts: KVCache  # prefilled
    tokens: Any
    length: Any
    orders: Orders
    moves: Moves


def abstract_arrays(model, start, replicas: int, rows: int, held: int, max_prompt: int) -> Shapes:
    """The shapes for so many slots and prompts held by each replica; `start` makes the slots."""

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    each, all_rows, prompts = integers(replicas), integers(replicas * rows), replicas * held
    return Shapes(
        jax.eval_shape(start), jax.eval_shape(lambda: model.make_cache(prompts, max_prompt, False)),
        integers(prompts, max_prompt), integers(prompts), Orders(each, *[all_rows] * 6), Moves(each, all_rows, all_rows),
    )  # fmt: skip


def sizes_of(rows: int, max_response: int) -> list[int]:
    """Slots of each `decode` program, descending: a smaller one pays for its compilation only where responses are long."""
    sizes = [rows]
    while len(sizes) < min(SIZES, max_response // CHUNK) and sizes[-1] // 2 >= FEWEST_ROWS:
        sizes.append(sizes[-1] // 2)
    return sizes


class Sheet:
    """Where the tokens of B responses are written down; host numpy."""

    def __init__(self, responses: int, sampling: Sampling):
        shape = (responses, sampling.max_response)
        self.stop_ids = sampling.stop_ids
        self.response = np.full(shape, sampling.pad_id, np.int32)
        self.logprobs = np.zeros(shape, np.float32)
        self.length = np.zeros(responses, np.int64)

    def write(self, seats: np.ndarray, chunk: Chunk) -> None:
        """Adds what a chunk drew for the responses in these seats (i64[rows], -1 = none)."""
        taken = np.flatnonzero(seats >= 0)
        response, before = seats[taken], self.length[seats[taken]]
        places = np.arange(chunk.token.shape[1])[None, :]
        drawn = places < (chunk.count[taken] - before)[:, None]  # bool[X, chunk]
        row, column = (np.broadcast_to(index, drawn.shape)[drawn] for index in (response[:, None], before[:, None] + places))
        self.response[row, column] = chunk.token[taken][drawn]
        self.logprobs[row, column] = chunk.logprob[taken][drawn]
        self.length[response] = chunk.count[taken]

    def tokens(self, response: int) -> np.ndarray:
        """i32[length] of one response."""
        return self.response[response, : self.length[response]]

    def rollout(self) -> Rollout:
        """All of them, once they have ended."""
        mask = np.arange(self.response.shape[1])[None, :] < self.length[:, None]
        last = np.take_along_axis(self.response, self.length[:, None] - 1, axis=1)[:, 0]
        return Rollout(self.response, mask, self.logprobs, truncated=~np.isin(last, self.stop_ids))


def align_left(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """(i32[Q, P] with the tokens in front, i32[Q] lengths) of prompts that are padded on the left."""
    length = prompts.mask.sum(axis=1).astype(np.int32)
    tokens = np.zeros_like(prompts.tokens)
    tokens[np.arange(tokens.shape[1])[None, :] < length[:, None]] = prompts.tokens[prompts.mask]
    return tokens, length


def make_orders(begun, rows: int, prompts: np.ndarray, length: np.ndarray, group_size: int, draw: Draw) -> Orders:
    """Seats that `Desk.seat` gave, as `insert` takes them; prompts and length as from `align_left`."""
    orders = Orders(np.zeros(len(begun), np.int32), *np.zeros((6, len(begun), rows), np.int32))
    for replica, entries in enumerate(begun):
        orders.number[replica] = len(entries)
        for place, entry in enumerate(entries):
            prompt, sample = divmod(entry.response, group_size)
            values = (
                entry.slot, entry.source, prompts[prompt, length[prompt] - 1], length[prompt] - 1,
                draw.first_prompt + prompt, sample,
            )  # fmt: skip
            for array, value in zip(orders[1:], values, strict=True):
                array[replica, place] = value
    return Orders(orders.number, *(array.reshape(-1) for array in orders[1:]))


def make_moves(moved, rows: int) -> Moves:
    """Moves that `Desk.gather` made, as `move` takes them."""
    moves = Moves(np.zeros(len(moved), np.int32), *np.zeros((2, len(moved), rows), np.int32))
    for replica, pairs in enumerate(moved):
        moves.number[replica] = len(pairs)
        for place, (source, target) in enumerate(pairs):
            moves.source[replica, place], moves.target[replica, place] = source, target
    return Moves(moves.number, moves.source.reshape(-1), moves.target.reshape(-1))
