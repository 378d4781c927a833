"""Policy losses: one rule per method, each saying what a token is worth and how hard it pulls.

Every token-level method is

    loss = -A * (v + g * (logprobs - stop_gradient(logprobs)))

with a value v and a gradient weight g that are constants to the differentiation: v is what is reported, g multiplies
A * grad log pi. A rule computes (v, g) from the log-ratio and the sign of the advantage; METHODS lists the rules, and
adding a method is one function and one line there. With one update per iteration the ratio is 1, every g is 1, and
every method is the same.

Two habits keep the rules finite. The log-ratio is clamped to [-20, 20] before anything else, and a rule chooses its
exponent *before* the one exp: DGPO's two decay branches under a `where` of exps would turn gradients NaN as soon as the
branch not taken overflows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: beyond it a ratio says only that something is broken


class Tokens(NamedTuple):
    """What a rule may look at; all of one shape, constants to the differentiation, finite also where masked."""

    log_ratio: Any  # f32, log pi - log pi_old, clamped
    logprobs: Any  # f32
    advantages: Any  # f32
    segment: Any  # i32 or None, for sequence-level methods
    mask: Any  # bool, True where the token counts


class Method(NamedTuple):
    """A rule and the published values of the settings it reads."""

    rule: Callable[..., tuple[Any, Any]]
    defaults: dict[str, float | None]


def token_loss(method, logprobs, old_logprobs, advantages, segment=None, mask=None, **settings):
    """The policy loss of each token.

    Args:
        method: a name in METHODS.
        logprobs: f32[...], of the sampled tokens under the weights being trained; differentiated.
        old_logprobs: f32[...], under the weights that sampled.
        advantages: f32[...], one per token.
        segment: i32[...], which sequence a token belongs to; only sequence-level methods read it.
        mask: bool[...], True where a token counts; elsewhere values may be anything, NaN included.
        **settings: clip_low, clip_high, n, m, dual_clip, ...; one left out or None takes the method's published value.
    Returns:
        f32[...], loss per token, 0 where masked.
    Raises:
        ValueError: unknown method, or a setting that no method has.
    """
    rule, resolved = METHODS[check_method(method)].rule, resolve_settings(method, **settings)
    mask = jnp.ones(logprobs.shape, bool) if mask is None else mask
    # Masking the inputs and not the loss: 0 * NaN in the backward pass is NaN.
    logprobs, old_logprobs, advantages = (jnp.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    value, weight = rule(observe(logprobs, old_logprobs, advantages, segment, mask), **resolved)
    surrogate = stop_gradient(value) + stop_gradient(weight) * (logprobs - stop_gradient(logprobs))
    return -advantages * surrogate


def observe(logprobs, old_logprobs, advantages, segment, mask) -> Tokens:
    """The constants that rules and metrics look at; arguments as in `token_loss`, already masked."""
    logprobs = stop_gradient(logprobs)
    log_ratio = jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return Tokens(log_ratio, logprobs, advantages, segment, mask)


def leaving_region(tokens: Tokens, *, clip_low, clip_high):
    """Where a step would move the ratio further out of [1 - clip_low, 1 + clip_high].

    Returns:
        bool arrays (too_low, too_high): below and with a negative advantage; above and with a positive one.
    """
    ratio = jnp.exp(tokens.log_ratio)
    too_low = (ratio < 1 - clip_low) & (tokens.advantages < 0)
    too_high = (ratio > 1 + clip_high) & (tokens.advantages > 0)
    return too_low & tokens.mask, too_high & tokens.mask


def grpo(tokens: Tokens, *, clip_low, clip_high, dual_clip):
    """Hard clipping: a token leaving the region keeps the bound as its value and loses its gradient.

    Source: PPO (arXiv:1707.06347) eq. 7; clip_high apart from clip_low is DAPO's clip-higher (arXiv:2503.14476).
    """
    too_low, too_high = leaving_region(tokens, clip_low=clip_low, clip_high=clip_high)
    ratio = jnp.exp(tokens.log_ratio)
    value = jnp.where(too_low, 1 - clip_low, jnp.where(too_high, 1 + clip_high, ratio))
    weight = jnp.where(too_low | too_high, 0.0, ratio)
    return apply_dual_clip(tokens, value, weight, dual_clip)


def dgpo(tokens: Tokens, *, clip_low, clip_high, n, m, dual_clip):
    """Soft clipping of the gradient of the probability: weights decay polynomially outside the region.

    Below it, with A < 0: r^(n+1) / (1 - clip_low)^n. Above it, with A > 0: r^(1 - 1/m) (1 + clip_high)^(1/m).
    Both meet r at the bounds. The weight on grad pi, which is this over r, vanishes on both sides.

    Source: DGPO (arXiv:2603.14389), the decay functions of its figure 2. Without a dual clip, as in its code.
    """
    too_low, too_high = leaving_region(tokens, clip_low=clip_low, clip_high=clip_high)
    x = tokens.log_ratio
    below = (n + 1) * x - n * jnp.log1p(-clip_low)
    above = (1 - 1 / m) * x + jnp.log1p(clip_high) / m
    weight = jnp.exp(jnp.where(too_low, below, jnp.where(too_high, above, x)))
    return apply_dual_clip(tokens, weight, weight, dual_clip)


def reinforce(tokens: Tokens):
    """The plain policy gradient; with every advantage 1 it is supervised learning of the sampled tokens.

    Source: Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    return tokens.logprobs, jnp.ones_like(tokens.logprobs)


def apply_dual_clip(tokens: Tokens, value, weight, dual_clip):
    """With A < 0, a ratio above dual_clip keeps that value and loses its gradient; None = off.

    Source: dual-clip PPO (arXiv:1912.09729), section 3.
    """
    if dual_clip is None:
        return value, weight
    too_far = (jnp.exp(tokens.log_ratio) > dual_clip) & (tokens.advantages < 0)
    return jnp.where(too_far, dual_clip, value), jnp.where(too_far, 0.0, weight)


METHODS = {
    "dgpo": Method(dgpo, {"clip_low": 0.2, "clip_high": 0.28, "n": 1.0, "m": 2.0, "dual_clip": None}),
    "grpo": Method(grpo, {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}),
    "reinforce": Method(reinforce, {}),
}

SETTINGS = frozenset(name for method in METHODS.values() for name in method.defaults)


def check_method(method: str) -> str:
    """The name itself, or a ValueError that lists the names there are."""
    if method not in METHODS:
        raise ValueError(f"loss.method is {method!r}, which is not a method; choose one of {', '.join(METHODS)}.")
    return method


def resolve_settings(method: str, **settings) -> dict[str, float | None]:
    """The settings the method reads: those given, and its published values for those that are None.

    Raises:
        ValueError: a name that no method has. A setting that only other methods have is ignored.
    """
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is a setting of no method; there are {', '.join(sorted(SETTINGS))}.")
    defaults = METHODS[check_method(method)].defaults
    return {name: default if settings.get(name) is None else settings[name] for name, default in defaults.items()}
