"""The one table of parameters: name -> shape, logical axes, Hugging Face name and layout.

Parameters are one plain nested dict of arrays, the layers stacked on a leading axis [L, ...]. Shapes, shardings,
initial values, weight decay and the reading of checkpoints all follow from this table; nothing is read from NNX
metadata, where stacked layers lose their layer axis (docs/design.md).
"""

import functools
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgpo_jax.quantization import quantise
from dgpo_jax.sharding import RULES, sharding_for
from dgpo_jax.types import Quantized


class Parameter(NamedTuple):
    """One array of the model."""

    shape: tuple[int, ...]  # with the leading L where it is per layer
    axes: tuple[str, ...]  # logical axis of each dimension, see sharding.RULES
    hugging_face: str  # its name there, "{layer}" where it is per layer
    # For each dimension of the Hugging Face tensor, which of our axes it is made of (major first):
    # ("key_heads queries head", "width") reads a [K*M*H, D] matrix as [K, M, H, D].
    layout: tuple[str, ...]

    @property
    def stacked(self):
        """True if there is one such tensor per layer in the Hugging Face file."""
        return self.axes[0] == "layers"

    @property
    def hugging_face_shape(self):
        """Shape of the Hugging Face tensor (of one layer)."""
        size = dict(zip(self.axes, self.shape, strict=True))
        return tuple(math.prod(size[axis] for axis in group.split()) for group in self.layout)

    @property
    def inputs(self):
        """The axes that a product sums over: Hugging Face has a matrix's outputs in front."""
        return tuple(self.layout[-1].split())

    @property
    def quantised(self):
        """True if it may be kept in eight bits: the matrices, but not the table that embeddings are looked up in."""
        return len(self.layout) == 2 and self.hugging_face != "model.embed_tokens.weight"

    @property
    def merged_shape(self):
        """Our shape with the axes that are one dimension of the Hugging Face tensor as one here too."""
        sizes = dict(zip(self.layout, self.hugging_face_shape, strict=True))
        in_our_order = sorted(self.layout, key=lambda group: self.axes.index(group.split()[0]))
        return (*self.shape[: int(self.stacked)], *(sizes[group] for group in in_our_order))


@functools.lru_cache
def table(config):
    """All parameters of the model: {"layers/attention/query/kernel": Parameter, ...}."""
    size = {
        "layers": config.layers,
        "width": config.width,
        "key_heads": config.key_heads,
        "queries": config.heads // config.key_heads,
        "head": config.head_width,
        "mlp": config.mlp_width,
        "vocab": config.vocab_size,
    }

    def entry(axes, hugging_face, *layout):
        axes = tuple(axes.split())
        return Parameter(tuple(size[axis] for axis in axes), axes, hugging_face, layout)

    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    rows = {
        "embed/table": entry("vocab width", "model.embed_tokens.weight", "vocab", "width"),
        "final_norm/scale": entry("width", "model.norm.weight", "width"),
        "layers/attention_norm/scale": entry("layers width", layer + "input_layernorm.weight", "width"),
        "layers/mlp_norm/scale": entry("layers width", layer + "post_attention_layernorm.weight", "width"),
        "layers/attention/query/kernel": entry(
            "layers width key_heads queries head", attention + "q_proj.weight", "key_heads queries head", "width"
        ),
        "layers/attention/key/kernel": entry(
            "layers width key_heads head", attention + "k_proj.weight", "key_heads head", "width"
        ),
        "layers/attention/value/kernel": entry(
            "layers width key_heads head", attention + "v_proj.weight", "key_heads head", "width"
        ),
        "layers/attention/output/kernel": entry(
            "layers key_heads queries head width", attention + "o_proj.weight", "width", "key_heads queries head"
        ),
        "layers/mlp/gate/kernel": entry("layers width mlp", mlp + "gate_proj.weight", "mlp", "width"),
        "layers/mlp/up/kernel": entry("layers width mlp", mlp + "up_proj.weight", "mlp", "width"),
        "layers/mlp/down/kernel": entry("layers mlp width", mlp + "down_proj.weight", "width", "mlp"),
    }
    if config.qkv_bias:
        rows["layers/attention/query/bias"] = entry(
            "layers key_heads queries head", attention + "q_proj.bias", "key_heads queries head"
        )
        rows["layers/attention/key/bias"] = entry("layers key_heads head", attention + "k_proj.bias", "key_heads head")
        rows["layers/attention/value/bias"] = entry(
            "layers key_heads head", attention + "v_proj.bias", "key_heads head"
        )
    if config.qk_norm:
        rows["layers/attention/query_norm/scale"] = entry("layers head", attention + "q_norm.weight", "head")
        rows["layers/attention/key_norm/scale"] = entry("layers head", attention + "k_norm.weight", "head")
    if not config.tied_embeddings:
        rows["unembed/kernel"] = entry("width vocab", "lm_head.weight", "vocab", "width")
    return rows


def nest(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        functools.reduce(lambda branch, parent: branch.setdefault(parent, {}), parents, tree)[last] = leaf
    return tree


def _map(function, config):
    return nest({name: function(name, parameter) for name, parameter in table(config).items()})


def parameter_shardings(config, mesh, rules=RULES):
    """The sharding of every parameter, as a nested dict.

    Raises:
        ValueError: a dimension that the mesh does not divide, such as more `tensor` devices than key heads.
    """
    return _map(lambda name, row: sharding_for(mesh, row.axes, row.shape, name, rules), config)


@functools.lru_cache
def _layer_axes(config):
    return {name.removeprefix("layers/"): row.axes[1:] for name, row in table(config).items() if row.stacked}


def layer_axes(config):
    """Logical axes of one layer's parameters, the leading L left out, as a nested dict of tuples."""
    return nest(_layer_axes(config))


def abstract_parameters(config, mesh=None, dtype="float32", rules=RULES):
    """Shape, dtype and sharding (none if mesh is None) of every parameter, without any memory."""

    def abstract(name, row):
        sharding = sharding_for(mesh, row.axes, row.shape, name, rules) if mesh is not None else None
        return jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype), sharding=sharding)

    return _map(abstract, config)


def abstract_layer(config):
    """Shape and dtype of one layer's parameters, as a nested dict."""
    stacked = abstract_parameters(config)["layers"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)


def initialise(config, key, dtype="float32"):
    """Random parameters: normal(0, initializer_std) matrices, zero biases, norms of one.

    Jit it with `out_shardings=parameter_shardings(...)`. The key of each parameter depends on its name only, so
    that neither the mesh nor the presence of other parameters changes it.
    """

    def value(name, row):
        if name.endswith("/bias"):
            return jnp.zeros(row.shape, dtype)
        if name.endswith("/scale"):
            return jnp.ones(row.shape, dtype)
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        # Drawn with the head axes as one: XLA compiles random numbers of rank 5 four times slower than of rank 3,
        # and the split axis stays the major one, so no device ever makes more than its part.
        return config.initializer_std * jax.random.normal(own_key, row.merged_shape, dtype).reshape(row.shape)

    return _map(value, config)


def quantise_matrices(config, params):
    """The parameters with every matrix in eight bits, a scale for each of its outputs; the embedding table stays as it is.

    Source: LLM.int8() (arXiv:2208.07339), section 2.1, of the weights alone.
    """
    rows = table(config)

    def one(path, leaf):
        row = rows["/".join(entry.key for entry in path)]
        if not row.quantised:
            return leaf
        return quantise(leaf, tuple(row.axes.index(axis) for axis in row.inputs))

    return jax.tree_util.tree_map_with_path(one, params)


def quantised_shardings(config, mesh, rules=RULES):
    """The shardings of `quantise_matrices`, a scale's like its matrix's."""

    def one(name, row):
        sharding = sharding_for(mesh, row.axes, row.shape, name, rules)
        if not row.quantised:
            return sharding
        return Quantized(sharding, sharding_for(mesh, tuple(None if axis in row.inputs else axis for axis in row.axes), None, name, rules))

    return _map(one, config)


def parameter_count(config):
    """Numbers in the model; tied embeddings count once."""
    return sum(math.prod(row.shape) for row in table(config).values())


def decays(config):
    """Nested dict of bools: True for the parameters that weight decay may shrink, the matrices."""
    return _map(lambda name, row: not name.endswith(("/bias", "/scale")), config)
