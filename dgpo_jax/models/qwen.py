"""The language model: Qwen2 and, by flags of its config, Qwen2.5, R1-Distill-Qwen, Qwen3 and Llama-shaped models.

`Model` holds the config and the mesh; parameters are an argument of every function. The parameters are f32 masters,
cast to the compute dtype layer by layer inside the scan, and gathered over `fsdp` there, so that never more than
a layer of them exists whole.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dgpo_jax.models import parameters
from dgpo_jax.models.attention import attention
from dgpo_jax.models.layers import layer_graphdef, rms_norm, rotary
from dgpo_jax.sharding import DECODE_RULES, RULES, constrain
from dgpo_jax.types import KVCache

# Logical axes of the cache.
CACHE_AXES = KVCache(
    key=("layers", "batch", "key_heads", "slots", "head"),
    value=("layers", "batch", "key_heads", "slots", "head"),
    segment=("batch", "slots"),
    position=("batch", "slots"),
)

_SAVED = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, without its parameters; hashable, so it can be closed over or static in a jit.

    Raises:
        ValueError: the mesh does not divide the model, such as more `tensor` devices than key heads.
    """

    config: Any  # ModelConfig
    mesh: Mesh | None = None  # None = one device, nothing is constrained

    def __post_init__(self):
        if self.mesh is not None:
            parameters.parameter_shardings(self.config, self.mesh)

    @property
    def compute_dtype(self):
        """Dtype of activations, of the cache and of the weights while they are multiplied."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        platform = self.mesh.devices.flat[0].platform if self.mesh is not None else jax.default_backend()
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")

    def init(self, key):
        """Random f32 parameters, made where they belong."""
        make = parameters.initialise
        shardings = parameters.parameter_shardings(self.config, self.mesh) if self.mesh is not None else None
        return jax.jit(make, static_argnums=0, out_shardings=shardings)(self.config, key)

    def cast(self, params):
        """A copy of the parameters in the compute dtype, for decoding."""
        return jax.tree.map(lambda leaf: leaf.astype(self.compute_dtype), params)

    def make_cache(self, batch, slots):
        """An empty cache for `batch` rows of `slots` tokens."""
        config = self.config
        shape = (config.layers, batch, config.key_heads, slots, config.head_width)
        cache = KVCache(
            key=jnp.zeros(shape, self.compute_dtype),
            value=jnp.zeros(shape, self.compute_dtype),
            segment=jnp.zeros((batch, slots), jnp.int32),
            position=jnp.zeros((batch, slots), jnp.int32),
        )
        return KVCache(*(constrain(leaf, self.mesh, axes) for leaf, axes in zip(cache, CACHE_AXES, strict=True)))

    def hidden(self, params, tokens, segment, position, cache=None, slot=None):
        """Runs all layers.

        Args:
            params: as the table in parameters.py, f32 or already in the compute dtype.
            tokens: i32[B, T].
            segment: i32[B, T], 0 = padding; tokens attend within their segment only.
            position: i32[B, T], within the segment.
            cache: None to attend among `tokens`, or the cache to write to and attend.
            slot: where tokens[:, 0] goes in the cache; i32[] for all rows or i32[B] per row. Tokens that do not
                fit are the caller's mistake: a scalar slot is moved back to fit, a slot per row drops them.
        Returns:
            [B, T, D] in the compute dtype after the final norm, and the cache (None without one).
        """
        x = self._embed(params["embed"]["table"], tokens)
        rotation = rotary(position, self.config)
        if cache is None:
            x = self._scan(params["layers"], x, rotation, segment, position)
        else:
            x, cache = self._scan_with_cache(params["layers"], x, rotation, segment, position, cache, slot)
        scale = params["final_norm"]["scale"].astype(self.compute_dtype)
        return rms_norm(x, scale, self.config.norm_eps), cache

    def unembedding(self, params):
        """The output matrix [D, V] in the compute dtype, gathered over fsdp, V split over tensor."""
        if self.config.tied_embeddings:
            matrix = params["embed"]["table"].astype(self.compute_dtype).T
        else:
            matrix = params["unembed"]["kernel"].astype(self.compute_dtype)
        return constrain(matrix, self.mesh, ("width", "vocab"), DECODE_RULES)

    def logits(self, params, tokens, segment=None, position=None):
        """f32[B, T, V] logits of the token after each token.

        Args:
            tokens: i32[B, T].
            segment: i32[B, T]; None = each row is one sequence.
            position: i32[B, T]; None = counted from the first token of each segment.
        """
        tokens = jnp.asarray(tokens)
        segment = jnp.ones_like(tokens) if segment is None else jnp.asarray(segment)
        position = count_positions(segment) if position is None else jnp.asarray(position)
        hidden, _ = self.hidden(params, tokens, segment, position)
        return jnp.einsum("btd,dv->btv", hidden, self.unembedding(params), preferred_element_type=jnp.float32)

    def _embed(self, table, tokens):
        # Looked up in a table that stays split over fsdp by width, so that neither the table nor (backward) its
        # gradient is ever gathered; only then are the rows split over fsdp instead, by one all-to-all.
        axes = ("batch", "tokens", "width")
        tokens = constrain(tokens, self.mesh, axes[:2], RULES | {"batch": "data"}, name="tokens")
        x = constrain(jnp.take(table, tokens, axis=0), self.mesh, axes, RULES | {"batch": "data"}, name="embedding")
        return self._by_batch(x.astype(self.compute_dtype))

    def _by_batch(self, x):
        return constrain(x, self.mesh, ("batch", "tokens", None), name="activations")

    def _layer(self, layer_params):
        # Cast first, then gathered: half the bytes.
        cast = self.cast(layer_params)
        if self.mesh is not None:
            axes = parameters.layer_axes(self.config)
            cast = jax.tree.map(lambda leaf, names: constrain(leaf, self.mesh, names, DECODE_RULES), cast, axes)
        return nnx.merge(layer_graphdef(self.config), cast)

    def _attention(self, *arguments):
        config = self.config
        return attention(*arguments, implementation=config.attention, chunk=config.attention_chunk)

    def _scan(self, layers, x, rotation, segment, position):
        def attend(query, key, value):
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
            return self._attention(query, key, value, segment, position, segment, position), None

        def body(x, layer_params):
            x, _ = self._layer(layer_params)(x, rotation, attend)
            return self._by_batch(x), None

        if self.config.remat != "none":
            # A scan keeps the two passes apart already, which is all that prevent_cse is for.
            body = jax.checkpoint(body, policy=_SAVED[self.config.remat], prevent_cse=False)
        return jax.lax.scan(body, x, layers)[0]

    def _scan_with_cache(self, layers, x, rotation, segment, position, cache, slot):
        cache_segment = _write(cache.segment, segment, slot)
        cache_position = _write(cache.position, position, slot)

        # The cache is part of the carry and each layer writes its own slice in place: as an input and output of
        # the scan it would be copied three times.
        def body(carry, scanned):
            x, keys, values = carry
            layer_params, layer = scanned

            def attend(query, key, value):
                written = (_write_layer(keys, key, slot, layer), _write_layer(values, value, slot, layer))
                key, value = (jax.lax.dynamic_index_in_dim(part, layer, 0, keepdims=False) for part in written)
                attended = self._attention(query, key, value, segment, position, cache_segment, cache_position)
                return attended, written

            x, (keys, values) = self._layer(layer_params)(x, rotation, attend)
            return (self._by_batch(x), keys, values), None

        indices = jnp.arange(self.config.layers, dtype=jnp.int32)
        (x, keys, values), _ = jax.lax.scan(body, (x, cache.key, cache.value), (layers, indices))
        return x, KVCache(keys, values, cache_segment, cache_position)


def count_positions(segment):
    """i32[B, T]: how far each token is from the first of its run of equal segments."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32)[None, :], segment.shape)
    before = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jnp.where(segment != before, index, 0)
    return index - jax.lax.cummax(first, axis=1)


def _slots_per_row(slot, batch, tokens):
    # Two index arrays that broadcast to [B, T].
    return jnp.arange(batch)[:, None], slot[:, None] + jnp.arange(tokens, dtype=slot.dtype)[None, :]


def _write(cached, new, slot):
    # cached [B, S], new [B, T]
    slot = jnp.asarray(slot, jnp.int32)
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (jnp.int32(0), slot))
    row, slots = _slots_per_row(slot, *new.shape)
    return cached.at[row, slots].set(new.astype(cached.dtype))


def _write_layer(cached, new, slot, layer):
    # cached [L, B, K, S, H], new [B, T, K, H]
    slot = jnp.asarray(slot, jnp.int32)
    if slot.ndim == 0:
        zero = jnp.int32(0)
        return jax.lax.dynamic_update_slice(cached, new.swapaxes(1, 2)[None], (layer, zero, zero, slot, zero))
    row, slots = _slots_per_row(slot, *new.shape[:2])
    return cached.at[layer, row, :, slots].set(new)  # the indexed axes come first: [B, T, K, H]


def build(config, mesh=None):
    """The model of a ModelConfig; raises ValueError if the mesh does not divide it."""
    return Model(config, mesh)
