"""One decoder layer as Flax NNX modules; Qwen2, Qwen3 and Llama differ in which parameters the table gives it.

The modules give the code its structure. They are built once from shapes (see `layer_graphdef`) and merged with one
layer's slice of the stacked parameters inside the scan of qwen.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgpo_jax.models.parameters import abstract_layer


class RMSNorm(nnx.Module):
    """Scales the last axis to a mean square of one; f32 inside, the input's dtype outside."""

    def __init__(self, weights, epsilon):
        self.scale = nnx.Param(weights["scale"])
        self.epsilon = epsilon

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.epsilon)


def rms_norm(x, scale, epsilon):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in f32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * _aligned(scale.astype(jnp.float32), x32)).astype(x.dtype)


def _aligned(weights, x):
    # Broadcasts are spelled out, so that the code also runs under jax_numpy_rank_promotion="raise".
    return weights.reshape((1,) * (x.ndim - weights.ndim) + weights.shape)


class Projection(nnx.Module):
    """A matrix product named by its einsum, with a bias if the table has one."""

    def __init__(self, weights, equation):
        self.kernel = nnx.Param(weights["kernel"])
        self.bias = nnx.Param(weights["bias"]) if "bias" in weights else None
        self.equation = equation

    def __call__(self, x):
        y = product(self.equation, x, self.kernel[...])
        if self.bias is None:
            return y
        # In f32, or the bias's gradient, a sum over all tokens, would be added up in bfloat16.
        return (y.astype(jnp.float32) + _aligned(self.bias[...].astype(jnp.float32), y)).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation, x, kernel):
    """The matrix product that an einsum names, with a backward pass of two more.

    The kernel's gradient is x transposed times the output's gradient, or the transpose of the product the other way round.
    On CPU the operand that is transposed is copied first, at a small share of the speed of the product, so it is the
    smaller one here; the derived backward pass always takes the output's.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation, x, kernel):
    # Not by calling `product`: model.remat="dots" keeps matrix products, and would not see one inside.
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(equation, kept, pull):
    x, kernel = kept
    inputs, of_output = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    to_x = jnp.einsum(f"{of_output},{of_kernel}->{of_x}", pull, kernel)
    if x.size <= pull.size:
        return to_x, jnp.einsum(f"{of_x},{of_output}->{of_kernel}", x, pull)
    # Named so that the output's letters come first: einsum then makes the output's gradient the first operand.
    turned = "".join(sorted(of_kernel, key=lambda letter: letter not in of_output))
    return to_x, jnp.einsum(f"{turned}->{of_kernel}", jnp.einsum(f"{of_output},{of_x}->{turned}", pull, x))


product.defvjp(_product_forward, _product_backward)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding; query head k * M + m of Hugging Face is [k, m] here."""

    def __init__(self, weights, config):
        self.query = Projection(weights["query"], "btd,dkmh->btkmh")
        self.key = Projection(weights["key"], "btd,dkh->btkh")
        self.value = Projection(weights["value"], "btd,dkh->btkh")
        self.output = Projection(weights["output"], "btkmh,kmhd->btd")
        normed = "query_norm" in weights
        self.query_norm = RMSNorm(weights["query_norm"], config.norm_eps) if normed else None
        self.key_norm = RMSNorm(weights["key_norm"], config.norm_eps) if normed else None

    @jax.named_scope("attention")
    def __call__(self, x, rotation, attend):
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        attended, kept = attend(query, key, value)
        return self.output(attended), kept


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, weights):
        self.gate = Projection(weights["gate"], "btd,df->btf")
        self.up = Projection(weights["up"], "btd,df->btf")
        self.down = Projection(weights["down"], "btf,fd->btd")

    @jax.named_scope("mlp")
    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each after a norm and added to what came in."""

    def __init__(self, weights, config):
        self.attention_norm = RMSNorm(weights["attention_norm"], config.norm_eps)
        self.attention = Attention(weights["attention"], config)
        self.mlp_norm = RMSNorm(weights["mlp_norm"], config.norm_eps)
        self.mlp = MLP(weights["mlp"])

    def __call__(self, x, rotation, attend):
        """Runs the layer.

        Args:
            x: [B, T, D].
            rotation: cosines and sines, see `rotary`.
            attend: (query [B, T, K, M, H], key [B, T, K, H], value) -> ([B, T, K, M, H], anything), the second
                handed back as it is: the caller decides whether keys go to a cache.
        """
        attended, kept = self.attention(self.attention_norm(x), rotation, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kept


@functools.lru_cache
def layer_graphdef(config):
    """The structure of one layer without its arrays, for `nnx.merge(graphdef, layer_params)`."""
    return nnx.graphdef(DecoderLayer(abstract_layer(config), config))


def rotary_frequencies(config):
    """Radians per position of each pair of the head, and the factor on cosine and sine.

    Returns:
        numpy f32[H / 2], float.
    Source: RoPE (arXiv:2104.09864); YaRN (arXiv:2309.00071), section 3, with the constants that transformers uses
        when a config leaves them out: 32 and 1 rotations, limits rounded outwards.
    """
    width, base = config.head_width, config.rope_theta
    frequencies = (1.0 / base ** (np.arange(0, width, 2, dtype=np.float32) / width)).astype(np.float32)
    if config.rope_scaling == "none":
        return frequencies, 1.0

    def pair_that_turns(rotations):
        # Index of the pair that turns this often within the trained length.
        length = config.rope_original_length
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(32)), 0)
    high = min(math.ceil(pair_that_turns(1)), width - 1)
    # Slow pairs (share 1) are slowed by the factor, fast ones (share 0) are kept.
    share = np.clip((np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    scaled = frequencies * (1 - share) + frequencies / config.rope_factor * share
    factor = 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0
    return scaled.astype(np.float32), factor


def rotary(position, config):
    """Cosines and sines of every token.

    Args:
        position: i32[B, T].
    Returns:
        Two f32[B, T, H / 2]. Always f32: bfloat16 rounds position 257 to 256.
    """
    frequencies, factor = rotary_frequencies(config)
    angles = position.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x, rotation):
    """Turns each pair (x[h], x[h + H / 2]) by its angle; f32 inside.

    Args:
        x: [B, T, ..., H].
    """
    cosine, sine = (
        jnp.expand_dims(part, tuple(range(2, x.ndim - 1))) for part in rotation
    )  # f32[B, T, 1.., H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
