"""Attention among packed sequences, behind one function for every platform and mesh.

    splash    TPU: JAX's splash attention kernel (attention_splash.py), which skips what the segments hide
    triton    GPU: JAX's Pallas Triton kernel (attention_triton.py)
    chunked   anywhere: plain XLA, a block of queries at a time, computed a second time in the backward pass
    plain     anywhere: plain XLA, all scores at once; what the others are checked against

A kernel is opaque to XLA, which could only run it whole on every device. It therefore runs inside a `shard_map` in
which each device has its rows and heads, as does everything on a mesh whose `context` axis splits the tokens of a row.
"""

import jax
import jax.numpy as jnp

from dgpo_jax.models.attention_splash import splash_attention
from dgpo_jax.models.attention_triton import triton_attention
from dgpo_jax.models.context import local_slots, whole_rows
from dgpo_jax.sharding import DECODE_RULES, RULES, map_shards

# With "auto", a row of T queries and S keys is handled at once up to this many T * S. Above it the f32 logits of
# one row and head exceed 1 MB, and it is cheaper to compute them a second time in the backward pass than to keep them.
PLAIN_LIMIT = 512 * 512

IMPLEMENTATIONS = ("auto", "plain", "chunked", "splash", "triton")
KERNELS = {"splash": "tpu", "triton": "gpu"}  # name -> the platform it is written for

# Logical axes of what attention takes: queries, keys, values, and segments and positions of queries and keys.
_ROW = ("batch", "tokens")
_QUERY, _KEY = ("batch", "tokens", "key_heads", "queries", "head"), ("batch", "key_heads", "tokens", "head")
_AXES = (_QUERY, _KEY, _KEY, _ROW, _ROW, _ROW, _ROW)


def attention(query, key, value, query_segment, query_position, key_segment, key_position,
              *, mesh=None, split_rows=False, implementation="auto", chunk=512, interpret=False):
    """Causal attention within segments.

    A query attends a key if both have the same segment, which is not 0, and the key's position is not after the
    query's. A query that attends nothing (padding) gives exactly 0, also in the gradient.

    Args:
        query: [B, T, K, M, H]; key head k serves the queries [:, :, k].
        key, value: [B, K, S, H], the layout of the cache; for a kernel, those of the same T tokens as the queries.
        query_segment, query_position: i32[B, T].
        key_segment, key_position: i32[B, S]. For a kernel, each segment's tokens lie one behind the other.
        mesh: of the arrays; None = one device.
        split_rows: True = the tokens of each row are split over the mesh's `context` devices, in the order of
            `context.spread`; False = these devices have rows of their own.
        implementation: one of IMPLEMENTATIONS; see `choose`.
        chunk: queries in a block of "chunked", whose memory is chunk * S and not T * S.
        interpret: runs a kernel as plain XLA on any platform, slowly; for tests.
    Returns:
        [B, T, K, M, H] in the dtype of `value`; the softmax is f32.
    Raises:
        ValueError: an unknown implementation, or one that this platform or mesh does not have.
    """
    devices = mesh.shape["context"] if mesh is not None and split_rows else 1
    chosen = choose(implementation, platform_of(mesh), devices, interpret)

    def on_one_device(query, key, value, query_segment, query_position, key_segment, key_position):
        slot = local_slots(query.shape[1], devices)
        key, value = (whole_rows(x, devices, axis=2) for x in (key, value))
        key_segment, key_position = (whole_rows(x, devices, axis=1) for x in (key_segment, key_position))
        if chosen in KERNELS:
            if chosen == "splash":
                output = splash_attention(query, key, value, query_segment, key_segment, slot, interpret=interpret)
            else:
                output = triton_attention(query, key, value, key_segment, interpret=interpret)
            # A kernel lets padding attend padding: its softmax needs something to divide by.
            return jnp.where((query_segment > 0)[:, :, None, None, None], output, 0)
        arguments = (query, key, value, query_segment, query_position, key_segment, key_position)
        small = query.shape[1] * key.shape[2] <= PLAIN_LIMIT
        if chosen == "plain" or query.shape[1] <= chunk or (chosen == "auto" and small):
            return _plain(*arguments)
        return _chunked(*arguments, chunk=chunk)

    if mesh is not None and (devices > 1 or chosen in KERNELS):
        on_one_device = map_shards(on_one_device, mesh, _AXES, _QUERY, RULES if split_rows else DECODE_RULES)
    return on_one_device(query, key, value, query_segment, query_position, key_segment, key_position)


def platform_of(mesh):
    """"cpu", "gpu" or "tpu": where programs for this mesh will run, also when they are compiled elsewhere."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def choose(implementation, platform, context=1, interpret=False):
    """Which implementation runs.

    Args:
        implementation: a name of IMPLEMENTATIONS.
        platform: "cpu", "gpu" or "tpu".
        context: devices that share a row. "triton" knows only whole rows.
        interpret: lets a kernel run on any platform.
    Returns:
        "splash" or "triton" where "auto" finds its platform, else `implementation`: "auto" is then "plain" or
        "chunked", by size.
    Raises:
        ValueError: an unknown implementation, or one that this platform or mesh does not have.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model.attention={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "auto":
        fitting = [name for name, home in KERNELS.items() if home == platform and (name != "triton" or context == 1)]
        return fitting[0] if fitting else "auto"
    if implementation in KERNELS and KERNELS[implementation] != platform and not interpret:
        raise ValueError(
            f"model.attention={implementation!r} is a kernel for {KERNELS[implementation]} and the devices are"
            f" {platform}; use auto."
        )
    if implementation == "triton" and context > 1:
        raise ValueError(
            f"model.attention='triton' attends within whole rows and mesh.context={context} splits them; use chunked or"
            " auto, or mesh.context=1."
        )
    return implementation


def _plain(query, key, value, query_segment, query_position, key_segment, key_position):
    visible = (
        (query_segment[:, :, None] == key_segment[:, None, :])
        & (key_position[:, None, :] <= query_position[:, :, None])
        & (query_segment > 0)[:, :, None]
    )[:, None, :, None]  # bool[B, 1, T, 1, S]
    # Token before query head, as the query lies: the CPU then copies less, a tenth of an update's time on short rows.
    logits = jnp.einsum("btkmh,bksh->bktms", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    # The lowest finite number and not -inf: a row without a visible key would be inf - inf = NaN, and NaN * 0 in
    # the gradient. Its uniform weights are then cut to 0 by the second `where`.
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("bktms,bksh->bktmh", weights.astype(value.dtype), value).swapaxes(1, 2)


def _chunked(query, key, value, query_segment, query_position, key_segment, key_position, *, chunk):
    batch, tokens = query.shape[:2]
    blocks = -(-tokens // chunk)
    missing = blocks * chunk - tokens

    def to_blocks(x):
        # [B, T, ...] -> [blocks, B, chunk, ...]; the slots added have segment 0 and attend nothing.
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(block):
        block_query, block_segment, block_position = block
        return _plain(block_query, key, value, block_segment, block_position, key_segment, key_position)

    output = jax.lax.map(one_block, (to_blocks(query), to_blocks(query_segment), to_blocks(query_position)))
    return jnp.moveaxis(output, 0, 1).reshape(batch, blocks * chunk, *query.shape[2:])[:, :tokens]
