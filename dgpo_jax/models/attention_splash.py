"""Splash attention for packed rows: JAX's TPU kernel, told which blocks the segments leave empty.

The kernel walks blocks of queries against blocks of keys by a table of which of them to compute. JAX makes that table
from a mask known beforehand, for causal attention half of the square. Here it is computed on the device from the
segments of each row: a row of 32K tokens that holds eight responses of 4K costs an eighth of one response of 32K.

    keys       1  1  2  2  3  -        rows of the table: blocks of queries, with the segment that is in them
    queries 1  x  .  .  .  .  .        x = computed, . = skipped: no key before the query has its segment
            1  x  x  .  .  .  .
            2  .  .  x  .  .  .
            2  .  .  x  x  .  .
            3  .  .  .  .  x  .
            -  .  .  .  .  .  x        padding attends itself, so that its softmax has something to divide by

Source: jax.experimental.pallas.ops.tpu.splash_attention; `MaskInfo` there describes the table.
"""

import jax
import jax.numpy as jnp

# Queries and keys of a block of scores. Rows are filled up to a multiple of it, those shorter than it to LANES.
BLOCK, LANES = 512, 128

# What the forward pass gives is named, so that a remat policy can keep it and the backward pass need not run it again.
RESIDUALS = "attention"


def splash_attention(query, key, value, query_segment, key_segment, slot, *, interpret=False):
    """Causal attention within segments; padding (segment 0) attends padding.

    Args:
        query: [B, T, K, M, H].
        key, value: [B, K, S, H].
        query_segment, key_segment: i32[B, T], i32[B, S].
        slot: i32[T], the key slot of each query: it attends no later ones.
        interpret: runs on any platform, slowly.
    Returns:
        [B, T, K, M, H]. What a padding query gives means nothing, and its gradient must be 0.
    """
    rows, tokens, key_heads, queries, width = query.shape
    block_q, block_k = (_block(size) for size in (tokens, key.shape[2]))
    # The kernel does not scale. [B, T, K, M, H] -> [B, K * M, T, H], as it groups heads.
    query = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    query = jnp.moveaxis(query, 1, 3).reshape(rows, key_heads * queries, tokens, width)
    query, query_segment = _fill(query, 2, block_q), _fill(query_segment, 1, block_q)
    key, value, key_segment = _fill(key, 2, block_k), _fill(value, 2, block_k), _fill(key_segment, 1, block_k)
    slot = _fill(slot, 0, block_q, mode="edge")

    def one_row(query, key, value, query_segment, key_segment):
        kernel = _kernel(query_segment, key_segment, slot, block_q, block_k, interpret)
        return kernel(query, key, value, _library()[0].SegmentIds(query_segment, key_segment))

    # One kernel call after the other: each row has a table of its own.
    output = jax.vmap(one_row)(query, key, value, query_segment, key_segment)[:, :, :tokens]
    return jnp.moveaxis(output.reshape(rows, key_heads, queries, tokens, width), 3, 1)


def computed_blocks(query_segment, key_segment, slot, block_q, block_k):
    """Which blocks of scores hold anything.

    Args:
        query_segment, key_segment, slot: i32[T], i32[S], i32[T]; T and S whole blocks.
    Returns:
        bool[T / block_q, S / block_k]. May say True too often, where segments are not in ascending order; every query
        has at least its own key computed.
    """

    def ends(x, block):  # the smallest and largest of each block
        blocks = x.reshape(-1, block)
        return blocks.min(axis=1), blocks.max(axis=1)

    last = jnp.iinfo(jnp.int32).max  # padding comes behind the segments, and so does its number
    query_low, query_high = ends(jnp.where(query_segment > 0, query_segment, last), block_q)
    key_low, key_high = ends(jnp.where(key_segment > 0, key_segment, last), block_k)
    slot_low, slot_high = ends(slot, block_q)
    key_slot_low, key_slot_high = ends(jnp.arange(len(key_segment), dtype=jnp.int32), block_k)

    causal = key_slot_low[None, :] <= slot_high[:, None]
    shared = (key_low[None, :] <= query_high[:, None]) & (query_low[:, None] <= key_high[None, :])
    own = causal & (slot_low[:, None] <= key_slot_high[None, :])
    return own | (causal & shared & (query_low < last)[:, None])


def _kernel(query_segment, key_segment, slot, block_q, block_k, interpret):
    splash, masks = _library()
    computed = computed_blocks(query_segment, key_segment, slot, block_q, block_k)

    def table(following):  # small types: these arrays live in scalar memory
        kind = jnp.int8 if max(computed.shape) < 128 else jnp.int16
        return masks.MaskInfo(
            data_next=following.astype(kind)[None], mask_next=None, block_mask=computed.astype(jnp.int8)[None],
            partial_mask_blocks=None, q_sequence=slot,
        )  # fmt: skip

    by_query, by_key = table(_next_computed(computed)), table(_next_computed(computed.T).T)
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k, block_q_dq=block_q,
        block_kv_dq=block_k,
    )  # fmt: skip
    return splash.SplashAttentionKernel(
        by_query, by_query, by_key, block_sizes=sizes, is_mqa=False, save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=RESIDUALS,
        mask_function=_not_later, interpret=interpret,
    )  # fmt: skip


def _next_computed(computed):
    """For each block the column of the first computed one from there on, row by row: what the kernel fetches meanwhile.

    A block that is computed is its own next: the kernel reads from it where it is.
    """
    width = computed.shape[1]
    count = computed.size
    index = jnp.where(computed.ravel(), jnp.arange(count, dtype=jnp.int32), count - 1)
    return (jax.lax.cummin(index, reverse=True) % width).reshape(computed.shape)


def _not_later(query_slot, key_slot):
    # A function of the module: the kernel's compiled programs are kept by it.
    return query_slot >= key_slot


def _block(tokens):
    return BLOCK if tokens >= BLOCK else -(-tokens // LANES) * LANES


def _fill(x, axis, block, mode="constant"):
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, missing, mode=mode)


def _library():
    # Imported where it is used: half a second that other platforms need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

    return splash_attention_kernel, splash_attention_mask_info
