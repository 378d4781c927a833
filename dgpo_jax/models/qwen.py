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
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dgpo_jax.models import decoding, parameters
from dgpo_jax.models.attention import attention, choose, platform_of
from dgpo_jax.models.attention_splash import RESIDUALS
from dgpo_jax.models.context import collect, spread
from dgpo_jax.models.layers import layer_graphdef, rms_norm, rotary
from dgpo_jax.quantization import cast
from dgpo_jax.sharding import RULES, constrain, gather

_POLICIES = jax.checkpoint_policies
_LAYER_INPUT = "activations"

# What the forward pass keeps of a layer for its backward pass, besides the layer's input.
_SAVED = {
    "dots": _POLICIES.save_from_both_policies(
        # The splash kernel is no matrix product to XLA, and its second run would cost as much as its first.
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(RESIDUALS)
    ),
    "full": _POLICIES.nothing_saveable,
    # Not even the input stays on the device: it waits in the host's memory.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, without its parameters; hashable, so it can be closed over or static in a jit.

    Raises:
        ValueError: the mesh does not divide the model, such as more `tensor` devices than key heads, or its platform
            lacks the kernel that `model.attention` names.
    """

    config: Any  # ModelConfig
    mesh: Mesh | None = None  # None = one device, nothing is constrained

    def __post_init__(self):
        if self.mesh is not None:
            choose(self.config.attention, platform_of(self.mesh), self.mesh.shape["context"])
            parameters.parameter_shardings(self.config, self.mesh)

    @property
    def compute_dtype(self):
        """Dtype of activations, of the cache and of the weights while they are multiplied."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if platform_of(self.mesh) == "cpu" else "bfloat16")

    def init(self, key):
        """Random f32 parameters, made where they belong."""
        make = parameters.initialise
        shardings = parameters.parameter_shardings(self.config, self.mesh) if self.mesh is not None else None
        return jax.jit(make, static_argnums=0, out_shardings=shardings)(self.config, key)

    def cast(self, params):
        """A copy of the parameters in the compute dtype, for decoding."""
        return cast(params, self.compute_dtype)

    def hidden(self, params, tokens, segment, position):
        """Runs all layers on packed rows.

        Args:
            params: as the table in parameters.py, f32 or already in the compute dtype.
            tokens: i32[B, T].
            segment: i32[B, T], 0 = padding; tokens attend within their segment only.
            position: i32[B, T], within the segment.
        Returns:
            [B, T, D] in the compute dtype, after the final norm.
        """
        tokens, segment, position = (spread(x, self.mesh) for x in (tokens, segment, position))
        x = self.embed(params, tokens)
        x = self._scan(params["layers"], x, rotary(position, self.config), segment, position)
        return collect(self.final_norm(params, x), self.mesh)

    def make_cache(self, rows, slots, int8=False):
        """An empty cache for `rows` sequences of `slots` tokens; see decoding.py, as of the next two."""
        return decoding.make_cache(self, rows, slots, int8)

    def prefill(self, params, tokens, length):
        """The cache of whole prompts: (params, i32[B, P], i32[B]) -> KVCache of P slots."""
        return decoding.prefill(self, params, tokens, length)

    def decode(self, params, token, position, cache):
        """One token further in every row: (params, i32[B], i32[B], KVCache) -> ([B, D], KVCache)."""
        return decoding.decode(self, params, token, position, cache)

    def final_norm(self, params, x):
        """The norm behind the last layer; keeps shape and dtype."""
        return rms_norm(x, params["final_norm"]["scale"].astype(self.compute_dtype), self.config.norm_eps)

    def unembedding(self, params):
        """The output matrix [D, V] in the compute dtype, gathered over fsdp, V split over tensor."""
        if self.config.tied_embeddings:
            matrix = params["embed"]["table"].astype(self.compute_dtype).T
        else:
            matrix = self.cast(params["unembed"]["kernel"])
        return gather(matrix, self.mesh, ("width", "vocab"), name="unembedding")

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
        hidden = self.hidden(params, tokens, segment, position)
        return jnp.einsum("btd,dv->btv", hidden, self.unembedding(params), preferred_element_type=jnp.float32)

    def embed(self, params, tokens):
        """i32[B, T] -> [B, T, D] in the compute dtype."""
        table = params["embed"]["table"]
        # Looked up in a table that stays split over fsdp by width, so that neither the table nor (backward) its
        # gradient is ever gathered; only then are the rows split over fsdp instead, by one all-to-all.
        axes = ("batch", "tokens", "width")
        tokens = constrain(tokens, self.mesh, axes[:2], RULES | {"batch": "data"}, name="tokens")
        x = constrain(jnp.take(table, tokens, axis=0), self.mesh, axes, RULES | {"batch": "data"}, name="embedding")
        return self.by_batch(x.astype(self.compute_dtype))

    def by_batch(self, x):
        """Pins activations [B, T, D]: rows and their tokens are split, the width is not."""
        return constrain(x, self.mesh, ("batch", "tokens", None), name="activations")

    def layer(self, layer_params):
        """A layer's module with its slice of the stacked parameters, cast and gathered."""
        # Cast first, then gathered: half the bytes.
        cast = self.cast(layer_params)
        if self.mesh is not None:
            axes = parameters.layer_axes(self.config)
            cast = jax.tree.map(lambda leaf, names: gather(leaf, self.mesh, names), cast, axes)
        return nnx.merge(layer_graphdef(self.config), cast)

    def attention(self, *arguments, split_rows=False):
        """`attention.attention` as the config wants it; `split_rows` as there."""
        config = self.config
        return attention(
            *arguments, mesh=self.mesh, split_rows=split_rows, implementation=config.attention, chunk=config.attention_chunk
        )

    def _scan(self, layers, x, rotation, segment, position):
        def attend(query, key, value):
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
            return self.attention(query, key, value, segment, position, segment, position, split_rows=True), None

        def body(x, layer_params):
            x = checkpoint_name(x, _LAYER_INPUT)
            x, _ = self.layer(layer_params)(x, rotation, attend)
            return self.by_batch(x), None

        if self.config.remat != "none":
            # A scan keeps the two passes apart already, which is all that prevent_cse is for.
            body = jax.checkpoint(body, policy=_SAVED[self.config.remat], prevent_cse=False)
        return jax.lax.scan(body, x, layers)[0]


def count_positions(segment):
    """i32[B, T]: how far each token is from the first of its run of equal segments."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32)[None, :], segment.shape)
    before = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jnp.where(segment != before, index, 0)
    return index - jax.lax.cummax(first, axis=1)


def build(config, mesh=None):
    """The model of a ModelConfig; raises ValueError if the mesh does not divide it."""
    return Model(config, mesh)
