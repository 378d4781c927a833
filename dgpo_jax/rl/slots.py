"""The sampler's programs: what happens on the device to the slots that responses are decoded in.

    prefill   runs prompts, each once, whatever the number of its samples
    insert    copies a prompt's cache into the slots of its samples
    move      puts a response into another slot, so that the first few slots hold all that are left
    decode    a chunk of tokens for the first `rows` slots, in one loop on the device

A slot is a row of the cache. Its response is decoded from the prompt's last token on: that token is the first to be fed
(again, the prefill has seen it), so that prefill needs no logits and every token is drawn in one place.

Each function is about one replica, whose slots are all there are; `per_replica` runs it on every replica of a mesh at
its own pace: their loops may end at different times.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dgpo_jax.quantization import is_quantised, quantise
from dgpo_jax.rl.drawing import Draw, Sampling, base_key, draw_tokens, row_keys
from dgpo_jax.sharding import DECODE_RULES, REPLICA_AXES, constrain, count_decoding
from dgpo_jax.types import KVCache


class Slots(NamedTuple):
    """C slots; one without a response is not active and holds anything."""

    cache: KVCache  # C rows of P + R slots
    keys: Any  # key[C], of the response
    token: Any  # i32[C], the next to be fed
    position: Any  # i32[C], where it goes
    count: Any  # i32[C], tokens drawn so far
    active: Any  # bool[C]


class Orders(NamedTuple):
    """Responses to begin: entry i goes to slot `slot[i]`; those behind a replica's `number` mean nothing."""

    number: Any  # i32[1] of each replica
    slot: Any  # i32[C]
    source: Any  # i32[C], row of the prefilled prompts
    token: Any  # i32[C], the prompt's last
    position: Any  # i32[C], of that token
    prompt: Any  # i32[C], number of the prompt within the iteration
    sample: Any  # i32[C], number of the sample of this prompt


class Moves(NamedTuple):
    """Responses that change slots; those behind a replica's `number` mean nothing. No slot is in both lists."""

    number: Any  # i32[1] of each replica
    source: Any  # i32[C]
    target: Any  # i32[C]


class Chunk(NamedTuple):
    """What a run of `decode` drew; row c belongs to slot c."""

    token: Any  # i32[C, chunk]
    logprob: Any  # f32[C, chunk]
    count: Any  # i32[C], tokens of the response so far: the last ones are the first entries of `token`
    active: Any  # bool[C]
    steps: Any  # i32[1] of each replica, how often its loop ran


def empty_slots(model, rows: int, slots: int, int8_cache: bool) -> Slots:
    """`rows` slots of the cache without a response, each with room for `slots` tokens, in eight bits or as computed."""
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    return Slots(model.make_cache(rows, slots, int8_cache), keys, zeros, zeros, zeros, jnp.zeros(rows, bool))


def insert(slots: Slots, prompts: KVCache, orders: Orders, draw: Draw) -> Slots:
    """Begins the ordered responses; only the rows of the cache that they go to are written."""
    number = orders.number[0]

    def copy(i, cache):
        rows = (_row(part, orders.source[i]) for part in prompts)
        return KVCache(*(
            _put_row(to, quantise(row, (4,)) if is_quantised(to) else row, orders.slot[i]) for to, row in zip(cache, rows, strict=True)
        ))  # fmt: skip

    cache = jax.lax.fori_loop(0, number, copy, slots.cache)
    rows = len(slots.token)
    place = jnp.where(jnp.arange(rows, dtype=jnp.int32) < number, orders.slot, rows)  # others fall off the end

    def put(array, values):
        return array.at[place].set(values, mode="drop")

    return Slots(
        cache, put(slots.keys, row_keys(base_key(draw), orders.prompt, orders.sample)), put(slots.token, orders.token),
        put(slots.position, orders.position), put(slots.count, jnp.zeros(rows, jnp.int32)), put(slots.active, jnp.ones(rows, bool)),
    )  # fmt: skip


def move(slots: Slots, moves: Moves) -> Slots:
    """Moves responses; the slots they leave have none."""

    def step(i, slots):
        source, target = moves.source[i], moves.target[i]
        cache = _put_row(slots.cache, _row(slots.cache, source), target)
        others = (array.at[target].set(array[source]) for array in slots[1:])
        slots = Slots(cache, *others)
        return slots._replace(active=slots.active.at[source].set(False))

    return jax.lax.fori_loop(0, moves.number[0], step, slots)


def _row(cache, row):
    # [L, B, K, S, H] -> [L, 1, K, S, H], of every array
    return jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, row, 1, axis=1), cache)


def _put_row(cache, new, row):
    zero = jnp.int32(0)
    return jax.tree.map(lambda part, of: jax.lax.dynamic_update_slice(part, of, (zero, row, zero, zero, zero)), cache, new)


def decode(model, params, slots: Slots, target, *, rows: int, chunk: int, sampling: Sampling) -> tuple[Slots, Chunk]:
    """Decodes up to `chunk` tokens of every response.

    Args:
        target: i32[], ends as soon as no more responses than this are active.
        rows: only the first slots are computed; the others have no response.
    """
    whole, slots = slots, Slots(slots.cache, *(array[:rows] for array in slots[1:]))
    stop_ids = jnp.array(sampling.stop_ids, jnp.int32)

    def going(carry):
        step, slots = carry[:2]
        return (step < chunk) & (jnp.sum(slots.active, dtype=jnp.int32) > target)

    def one_token(carry):
        step, slots, tokens, logprobs = carry
        position = jnp.where(slots.active, slots.position, 0)  # a slot without a response should read and cost little
        hidden, cache = model.decode(params, slots.token, position, slots.cache)
        token, logprob = draw_tokens(to_logits(model, params, hidden), slots.keys, slots.count, sampling)
        drawn = slots.active.astype(jnp.int32)
        count = slots.count + drawn
        ended = jnp.isin(token, stop_ids) | (count == sampling.max_response)
        slots = Slots(cache, slots.keys, token, slots.position + drawn, count, slots.active & ~ended)
        return step + 1, slots, _put_column(tokens, token, step), _put_column(logprobs, logprob, step)

    carry = (jnp.int32(0), slots, jnp.zeros((rows, chunk), jnp.int32), jnp.zeros((rows, chunk), jnp.float32))
    step, slots, tokens, logprobs = jax.lax.while_loop(going, one_token, carry)
    others = (jax.lax.dynamic_update_slice_in_dim(array, new, 0, axis=0) for array, new in zip(whole[1:], slots[1:], strict=True))
    return Slots(slots.cache, *others), Chunk(tokens, logprobs, slots.count, slots.active, step[None])


def _put_column(array, column, place):
    return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], place, axis=1)


def to_logits(model, params, hidden):
    """hidden dtype[B, D] -> f32[B, V]."""
    unembedding = model.unembedding(params).astype(hidden.dtype)
    logits = jnp.einsum("bd,dv->bv", hidden, unembedding, preferred_element_type=jnp.float32)
    # The whole vocabulary on every device of a replica: a running sum over a split one takes many small exchanges, among
    # them permutations, for which devices of all replicas would wait although their loops end at different times.
    return constrain(logits, model.mesh, ("batch", None), DECODE_RULES)


class Placement(NamedTuple):
    """Where the sampler's arrays live: rows split over the replicas of a mesh, or all on the default device (None)."""

    mesh: Any

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes along which replicas lie; `tensor` is inside one."""
        return REPLICA_AXES if self.mesh is not None else ()

    @property
    def replicas(self) -> int:
        """Groups of devices that decode independently."""
        return count_decoding(self.mesh) if self.mesh is not None else 1

    def specs(self, tree):
        """Rows of every array split over the replicas; a cache has its layers before its rows."""
        return jax.tree.map(lambda leaf: PartitionSpec(*[None] * (leaf.ndim == 5), self.axes), tree)

    def shardings(self, tree):
        """The same with a cache's key heads split over `tensor`; None without a mesh."""
        if self.mesh is None:
            return None
        cache, other = PartitionSpec(None, self.axes, "tensor"), PartitionSpec(self.axes)
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, cache if leaf.ndim == 5 else other), tree)

    @property
    def whole(self):
        """The sharding of what every replica has all of; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def program(self, function: Callable, arguments: tuple, outputs, donate: tuple[int, ...] = ()):
        """Jits a function of one replica, to run on every replica's part of the arguments.

        Args:
            arguments: for each a tree of abstract arrays over all replicas, or None if every replica has the whole.
            outputs: the same of what it returns.
        """
        if self.replicas > 1:
            in_specs = tuple(PartitionSpec() if tree is None else self.specs(tree) for tree in arguments)
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=self.specs(outputs), axis_names=set(self.axes), check_vma=False
            )
        return jax.jit(function, donate_argnums=donate, out_shardings=self.shardings(outputs))
