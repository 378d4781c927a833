"""Prefill and one-token decoding: the model's forward pass with a cache of keys and values.

A row of the cache holds one sequence from slot 0 on, so that a token's slot is its position and the rows may be of
different lengths. The slots behind a sequence hold anything; nothing attends them, and they are overwritten as it grows:

    slot         0    1    2    3    4    5
    row 0        a    b    x    y    -    -        prompt a b, response x y; the next token goes to slot 4
    row 1        c    d    e    f    -    -        prompt c d e, response f

Everything is about one replica: with several, this runs inside a `shard_map` over them, and only `tensor` is left to
the compiler.
"""

import jax
import jax.numpy as jnp

from dgpo_jax.models import decode_attention
from dgpo_jax.models.attention import platform_of
from dgpo_jax.models.layers import rotary
from dgpo_jax.quantization import is_quantised, quantise
from dgpo_jax.types import KVCache, Quantized

# Plain attention reads a window of the cache that holds the longest row; this many sizes, each half the next.
WINDOWS = 4
SMALLEST_WINDOW = 64


def make_cache(model, rows, slots, int8=False):
    """A cache of zeros for `rows` sequences of `slots` tokens or some more, in eight bits or in the compute dtype."""
    config = model.config
    shape = (config.layers, rows, config.key_heads, _rounded(model, slots), config.head_width)

    def empty():
        if int8:
            return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return jnp.zeros(shape, model.compute_dtype)

    return KVCache(empty(), empty())


def _rounded(model, slots):
    # The TPU kernels address a cache by blocks of slots.
    return -(-slots // decode_attention.SLOTS) * decode_attention.SLOTS if _on_tpu(model) else slots


def _on_tpu(model):
    return platform_of(model.mesh) == "tpu"


@jax.named_scope("prefill")
def prefill(model, params, tokens, length):
    """Runs whole prompts.

    Args:
        tokens: i32[B, P], padded on the right.
        length: i32[B], tokens of each prompt.
    Returns:
        KVCache of B rows and P slots, or some more.
    """
    tokens = jnp.pad(tokens, [(0, 0), (0, _rounded(model, tokens.shape[1]) - tokens.shape[1])])
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    position = jnp.broadcast_to(slots, tokens.shape)
    segment = (slots < length[:, None]).astype(jnp.int32)
    rotation = rotary(position, model.config)

    def body(x, layer_params):
        def attend(query, key, value):
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, P, H]
            return model.attention(query, key, value, segment, position, segment, position), KVCache(key, value)

        x, cache = model.layer(layer_params)(x, rotation, attend)
        return model.by_batch(x), cache

    return jax.lax.scan(body, model.embed(params, tokens), params["layers"])[1]


@jax.named_scope("decode")
def decode(model, params, token, position, cache):
    """Runs one more token of every row, and adds it to the cache.

    Args:
        token: i32[B].
        position: i32[B], the slot it goes to; the slots before it hold the row's earlier tokens.
        cache: of B rows or more; the first are read and written.
    Returns:
        ([B, D] in the compute dtype, after the final norm; KVCache). Donate the cache, or it is copied.
    """
    rotation = rotary(position[:, None], model.config)

    # The cache is part of the carry and each layer writes its own slice in place: as an input and output of the scan
    # it would be copied three times.
    def body(carry, scanned):
        x, cache = carry
        layer_params, layer = scanned

        def attend(query, key, value):
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            if _on_tpu(model) and not is_quantised(cache.key):
                written = decode_attention.write(cache, key, value, layer, position, mesh=model.mesh)
                return decode_attention.attend(query, written, layer, position, mesh=model.mesh)[:, None], written
            written = KVCache(*(_write(part, new, layer, position) for part, new in zip(cache, (key, value), strict=True)))
            return attend_window(query, written, layer, position)[:, None], written

        x, cache = model.layer(layer_params)(x, rotation, attend)
        return (model.by_batch(x), cache), None

    layers = jnp.arange(model.config.layers, dtype=jnp.int32)
    x = model.embed(params, token[:, None])
    (x, cache), _ = jax.lax.scan(body, (x, cache), (params["layers"], layers))
    return model.final_norm(params, x)[:, 0], cache


def _write(cached, new, layer, position):
    """Puts new [B, K, H] into the first rows of cached [L, .., K, S, H], each at its own slot."""
    if is_quantised(cached):
        return Quantized(*(_write(array, part, layer, position) for array, part in zip(cached, quantise(new, (2,)), strict=True)))
    rows = jnp.arange(len(new), dtype=jnp.int32)
    return cached.at[layer, rows, :, position].set(new, mode="promise_in_bounds", unique_indices=True)


def windows(slots):
    """Sizes of the part of the cache that is read, ascending; the last is all of it."""
    sizes = [slots]
    while len(sizes) < WINDOWS and sizes[0] // 2 >= SMALLEST_WINDOW:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def attend_window(query, cache, layer, position):
    """Attention of one token a row, as plain XLA.

    Args:
        query: [B, K, M, H].
        cache: KVCache of B rows or more, the token's own key and value in it.
        layer: i32[].
        position: i32[B], of the token; it attends the slots up to this one.
    Returns:
        [B, K, M, H].
    """
    sizes = windows(jax.tree.leaves(cache)[0].shape[3])

    def within(window):
        def attend(query, cache, layer, position):
            (key, key_scale), (value, value_scale) = (_window(part, layer, len(query), window) for part in cache)
            logits = jnp.einsum("bkmh,bksh->bkms", query, key.astype(query.dtype), preferred_element_type=jnp.float32)
            logits = logits * query.shape[-1] ** -0.5 * key_scale
            visible = jnp.arange(window, dtype=jnp.int32)[None, :] <= position[:, None]
            logits = jnp.where(visible[:, None, None], logits, -jnp.inf)  # a row sees at least its own token
            weights = jax.nn.softmax(logits, axis=-1) * value_scale
            return jnp.einsum("bkms,bksh->bkmh", weights.astype(query.dtype), value.astype(query.dtype))

        return attend

    smallest = jnp.searchsorted(jnp.array(sizes, jnp.int32), jnp.max(position) + 1)
    return jax.lax.switch(smallest, [within(size) for size in sizes], query, cache, layer, position)


def _window(part, layer, rows, window):
    """The first rows and slots of one layer: [rows, K, window, H], and their scales f32[rows, K, 1, window] or 1."""
    if is_quantised(part):
        values, scale = (_window(array, layer, rows, window)[0] for array in part)
        return values, scale.swapaxes(2, 3)
    heads, width = part.shape[2], part.shape[4]
    zero = jnp.int32(0)
    return jax.lax.dynamic_slice(part, (layer, zero, zero, zero, zero), (1, rows, heads, window, width))[0], 1.0
