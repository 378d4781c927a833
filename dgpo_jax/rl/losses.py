"""Policy losses: one rule per method, each saying what a token is worth and how hard it pulls.

Every method is

    loss = -A * (v + g * (logprobs - stop_gradient(logprobs)))

with a value v and a gradient weight g that are constants to the differentiation: v is what is reported, g multiplies
A * grad log pi. A rule computes both from the log-ratio and the sign of the advantage; METHODS lists the rules, and
adding a method is one function and one line there. With one update per iteration the ratio r is 1, so every g is 1, and
the methods that look at single tokens are all the same.

The weight g by method, L = 1 - clip_low, U = 1 + clip_high; where a cell is empty, and inside [L, U], it is r:

    method               A > 0, r > U         A < 0, r < L      elsewhere
    grpo, dr_grpo, dapo  0                    0
    gppo                 U                    L
    ce_gppo              beta2 U              beta1 L
    dgpo                 r^(1-1/m) U^(1/m)    r^(n+1) / L^n
    cispo, .._one_sided  U                    L                 r clipped to [L, U] for A of any sign
    aspo                 0                    0                 A > 0: 1 / r; never more than soft_clip
    gspo                 0                    0                 r is the geometric mean of its sequence's ratios
    gmpo                 0                    0                 the same mean, of ratios clipped one by one
    sapo                 4 s (1 - s) r with s = sigmoid(tau (r - 1)), everywhere
    reinforce            1 everywhere

Three habits keep the rules finite and exact. The log-ratio is clamped, to [-20, 20] by default, before anything else. A rule chooses
its exponent *before* the one exp: DGPO's two decay branches under a `where` of exps would turn gradients NaN as soon as
the branch not taken overflows. Bounds are compared as log-ratios, where GSPO's 3e-4 keeps all its digits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from dgpo_jax.rl.kl import MAX_LOG_RATIO


class Tokens(NamedTuple):
    """What a rule may look at; all of one shape, constants to the differentiation, and 0 where masked."""

    log_ratio: Any  # f32, log pi - log pi_old, clamped
    logprobs: Any  # f32
    advantages: Any  # f32
    segment: Any  # i32, 0 = padding, 1.. = the sequences of a row; None = each row is one sequence
    mask: Any  # bool, True where the token counts


class Regions(NamedTuple):
    """Where tokens lie outside the trust region; bool each. A token without advantage, hence a masked one, is nowhere."""

    too_low: Any = False  # below and A < 0: a step moves it further out
    too_high: Any = False  # above and A > 0: likewise
    low_reverse: Any = False  # below and A > 0: a step brings it back
    high_reverse: Any = False  # above and A < 0: likewise

    @property
    def leaving(self):
        return self.too_low | self.too_high

    def choose(self, too_low, too_high, elsewhere):
        """The first argument at tokens that are too low, the second at those too high, the third at all others."""
        return jnp.where(self.too_low, too_low, jnp.where(self.too_high, too_high, elsewhere))


class Surrogate(NamedTuple):
    """What a rule returns: value and weight of the tokens' shape; the rest may be left out by a method that lacks it."""

    value: Any  # f32, v
    weight: Any  # f32, g
    regions: Regions = Regions()  # by the ratio the rule saw: GSPO's is the sequence's, GMPO's bounds are on the log
    clipped: Any = False  # bool, what the method's reference code counts in actor/pg_clipfrac
    dual_clipped: Any = False  # bool, what it counts in actor/pg_clipfrac_lower; for ASPO both its soft clips


class Method(NamedTuple):
    """A rule and how its paper or, failing that, its authors' code runs it."""

    rule: Callable[..., Surrogate]
    settings: dict[str, float | None]  # what the rule reads, with the published values
    aggregation: str = "token-mean"  # how the losses of tokens become one
    sequence_ratio: bool = False  # True: the rule sees at every token the mean log-ratio of the whole sequence


def token_loss(
    method, logprobs, old_logprobs, advantages, segment=None, mask=None, *, max_log_ratio=MAX_LOG_RATIO, **settings
):
    """The policy loss of each token: f32[...], 0 where masked. As `policy_loss`; a mask of None counts every token."""
    mask = jnp.ones(logprobs.shape, bool) if mask is None else mask
    losses, _, _ = policy_loss(
        method, logprobs, old_logprobs, advantages, segment, mask, max_log_ratio=max_log_ratio, **settings
    )
    return losses


def policy_loss(
    method, logprobs, old_logprobs, advantages, segment, mask, *, max_log_ratio=MAX_LOG_RATIO, **settings
):
    """The policy loss of each token, and what the metrics are made of.

    Args:
        method: a name in METHODS.
        logprobs: f32[..., T], of the sampled tokens under the weights being trained; differentiated.
        old_logprobs: f32[..., T], under the weights that sampled.
        advantages: f32[..., T], one per token; GSPO and GMPO expect it constant over a sequence.
        segment: i32[..., T], which sequence of its row a token belongs to, numbered from 1, 0 = padding; None = each row
            is one sequence. Only GSPO and GMPO read it.
        mask: bool[..., T], True where a token counts; elsewhere values may be anything, NaN included.
        max_log_ratio: log-ratios are clamped to it, up and down; beyond 80 a rule's exp may overflow.
        **settings: clip_low, clip_high, n, m, dual_clip, ...; one left out or None takes the method's published value.
            Python numbers; a clip_low of 1 or more is no lower bound.
    Returns:
        (losses, Tokens, Surrogate). losses is f32[..., T], 0 where masked. Tokens.log_ratio is the token's own whatever
        the method; the leaves of Surrogate are broadcast to [..., T], its masks False where `mask` is.
    Raises:
        ValueError: unknown method, or a setting that no method has.
    """
    settings = resolve_settings(method, **settings)
    rule, sequence_ratio = METHODS[method].rule, METHODS[method].sequence_ratio
    # Masking the inputs and not the loss: 0 * NaN in the backward pass is NaN.
    logprobs, old_logprobs, advantages = (jnp.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    log_ratio = jnp.clip(logprobs - old_logprobs, -max_log_ratio, max_log_ratio)
    tokens = Tokens(*stop_gradient((log_ratio, logprobs, advantages)), segment, mask)

    seen = tokens._replace(log_ratio=sequence_mean(tokens.log_ratio, segment, mask)) if sequence_ratio else tokens
    surrogate = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, mask.shape), rule(seen, **settings))
    losses = -advantages * (surrogate.value + surrogate.weight * (logprobs - tokens.logprobs))
    return losses, tokens, surrogate


def sequence_sum(x, segment, mask):
    """Sums over the counted tokens of each sequence, given back at every token of it; arguments as in `Tokens`."""

    # Not a difference of running sums: that loses the digits GSPO's bounds of 3e-4 are made of.
    def row_sum(x, segment):
        return jax.ops.segment_sum(x, segment, num_segments=x.size + 1)[segment]

    segment = jnp.zeros(x.shape, jnp.int32) if segment is None else segment
    return jnp.vectorize(row_sum, signature="(t),(t)->(t)")(jnp.where(mask, x, 0), segment)


def sequence_mean(x, segment, mask):
    """Means as `sequence_sum` sums; 0 for a sequence with no counted token."""
    return sequence_sum(x, segment, mask) / jnp.maximum(sequence_sum(jnp.ones_like(x), segment, mask), 1)


def log_bounds(clip_low, clip_high):
    """The region [1 - clip_low, 1 + clip_high] of the ratio as bounds on its log; floats, -inf for no lower bound."""
    return (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)


def find_regions(tokens: Tokens, low, high) -> Regions:
    """Where tokens lie outside [low, high], bounds on the log-ratio."""
    below, above = tokens.log_ratio < low, tokens.log_ratio > high
    negative, positive = tokens.advantages < 0, tokens.advantages > 0
    return Regions(below & negative, above & positive, below & positive, above & negative)


def hold(tokens: Tokens, low, high):
    """Holds tokens that leave [low, high] at the bound: (Regions, f32 log-ratio)."""
    regions = find_regions(tokens, low, high)
    return regions, regions.choose(low, high, tokens.log_ratio)


def hard_clip(value, regions: Regions) -> Surrogate:
    """A token pulls as hard as it is worth, but one leaving the region not at all."""
    return Surrogate(value, jnp.where(regions.leaving, 0.0, value), regions, clipped=regions.leaving)


def apply_dual_clip(tokens: Tokens, surrogate: Surrogate, dual_clip) -> Surrogate:
    """With A < 0, a ratio above dual_clip keeps that value and loses its gradient; None = off.

    Source: dual-clip PPO (arXiv:1912.09729), section 3.
    """
    if dual_clip is None:
        return surrogate
    too_far = (tokens.log_ratio > math.log(dual_clip)) & (tokens.advantages < 0)
    value = jnp.where(too_far, dual_clip, surrogate.value)
    weight = jnp.where(too_far, 0.0, surrogate.weight)
    return surrogate._replace(value=value, weight=weight, dual_clipped=too_far)


def grpo(tokens: Tokens, *, clip_low, clip_high, dual_clip=None) -> Surrogate:
    """Hard clipping: a token leaving the region keeps the bound as its value and loses its gradient.

    On the sequence's ratio this is GSPO. verl's GSPO also stops the gradient of sequences whose mean log-ratio is above
    10, and does not clamp the log-ratios that the mean is taken of.

    Source: PPO (arXiv:1707.06347) eq. 7, GRPO (arXiv:2402.03300); clip_high apart from clip_low is DAPO's clip-higher
    (arXiv:2503.14476); Dr. GRPO (arXiv:2503.20783) changes the aggregation; GSPO (arXiv:2507.18071).
    """
    regions, held = hold(tokens, *log_bounds(clip_low, clip_high))
    return apply_dual_clip(tokens, hard_clip(jnp.exp(held), regions), dual_clip)


def gppo(tokens: Tokens, *, clip_low, clip_high, dual_clip, beta1=1.0, beta2=1.0) -> Surrogate:
    """Clipping that keeps the gradient: a token leaving the region pulls with the bound as its weight.

    CE-GPPO scales that pull, and the value with it, by beta1 below the region and beta2 above it. GPPO's paper argues
    against a dual clip; the code of both papers has one, 10 in its scripts.

    Source: GPPO (arXiv:2508.07629) eq. 11-12; CE-GPPO (arXiv:2509.20712), its code.
    """
    regions, held = hold(tokens, *log_bounds(clip_low, clip_high))
    weight = regions.choose(beta1, beta2, 1.0) * jnp.exp(held)
    return apply_dual_clip(tokens, Surrogate(weight, weight, regions, clipped=regions.leaving), dual_clip)


def dgpo(tokens: Tokens, *, clip_low, clip_high, n, m, dual_clip) -> Surrogate:
    """Soft clipping of the gradient of the probability: weights decay polynomially outside the region.

    Below it, with A < 0: r (r / (1 - clip_low))^n. Above it, with A > 0: r ((1 + clip_high) / r)^(1/m). Both meet r at
    the bounds. The weight on grad pi, which is this over r, vanishes on both sides.

    Source: DGPO (arXiv:2603.14389), the decay functions of its figure 2. Without a dual clip, as in its code; that
    counts tokens above one all the same, here they are counted where they are clipped.
    """
    low, high = log_bounds(clip_low, clip_high)
    regions, x = find_regions(tokens, low, high), tokens.log_ratio
    weight = jnp.exp(regions.choose(x + n * (x - low), x + (high - x) / m, x))
    return apply_dual_clip(tokens, Surrogate(weight, weight, regions, clipped=regions.leaving), dual_clip)


def cispo(tokens: Tokens, *, clip_low, clip_high) -> Surrogate:
    """REINFORCE weighted by the clipped ratio, whichever way the advantage points.

    The value has the sign and the size of a log-probability: not to be compared with other methods'. Every token
    outside the region counts as clipped, also one that a step brings back.

    Source: MiniMax-M1 (arXiv:2506.13585). It leaves the lower bound out; GPPO and DGPO compare with two bounds.
    """
    low, high = log_bounds(clip_low, clip_high)
    exponent = jnp.clip(tokens.log_ratio, low, high)
    weight = jnp.exp(exponent)
    return Surrogate(weight * tokens.logprobs, weight, find_regions(tokens, low, high), exponent != tokens.log_ratio)


def aspo(tokens: Tokens, *, clip_low, clip_high, soft_clip) -> Surrogate:
    """GRPO with the ratio of tokens with A > 0 turned over, so that unlikely ones pull harder and not less.

    A weight beyond soft_clip becomes soft_clip on log pi: the pull is continuous there, the value jumps.

    Source: ASPO (arXiv:2510.06062), its code. That widens both bounds to 0.4 for the fifth of a sequence's tokens with
    the highest entropy, which a rule does not see.
    """
    regions, held = hold(tokens, *log_bounds(clip_low, clip_high))
    clipped = hard_clip(jnp.exp(jnp.where(tokens.advantages > 0, -held, held)), regions)
    too_far = (clipped.value > soft_clip) & (tokens.advantages != 0)
    value = jnp.where(too_far, soft_clip * tokens.logprobs, clipped.value)
    weight = jnp.where(too_far, soft_clip, clipped.weight)
    return clipped._replace(value=value, weight=weight, dual_clipped=too_far)


def sapo(tokens: Tokens, *, tau_pos, tau_neg) -> Surrogate:
    """A smooth gate instead of bounds: the value is (4 / tau) sigmoid(tau (r - 1)), the weight its derivative by log r.

    Source: SAPO (arXiv:2511.20347); a token with A = 0 takes tau_neg, as in verl. The derivative is written s(z) s(-z):
    verl's s (1 - s) is exactly 0 from r = 50 on, or r = 18 in f32.
    """
    tau = jnp.where(tokens.advantages > 0, tau_pos, tau_neg)
    z = tau * jnp.expm1(tokens.log_ratio)
    weight = 4 * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * jnp.exp(tokens.log_ratio)
    return Surrogate(4 / tau * jax.nn.sigmoid(z), weight)


def gmpo(tokens: Tokens, *, clip_low, clip_high) -> Surrogate:
    """The geometric mean of a sequence's clipped ratios; a clipped token counts in it but gets no gradient.

    The bounds are on the log-ratio, [-clip_low, clip_high], so only an infinite clip_low is none. As in verl, every
    token outside them counts as clipped if it has an advantage, also one that a step brings back; verl counts those
    with A < 0 in pg_clipfrac_lower. verl does not clamp the log-ratios.

    Source: GMPO (arXiv:2507.20673). The mean of its tokens' losses is the paper's loss of a sequence.
    """
    regions, held = hold(tokens, -clip_low, clip_high)
    mean_ratio = jnp.exp(sequence_mean(held, tokens.segment, tokens.mask))
    outside = regions.leaving | regions.low_reverse | regions.high_reverse
    return hard_clip(mean_ratio, regions)._replace(clipped=outside)


def reinforce(tokens: Tokens) -> Surrogate:
    """The plain policy gradient; with every advantage 1 it is supervised learning of the sampled tokens.

    Source: Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    return Surrogate(tokens.logprobs, jnp.ones_like(tokens.logprobs))


SYMMETRIC, CLIP_HIGHER = {"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 0.2, "clip_high": 0.28}

METHODS = {
    "dgpo": Method(dgpo, {**CLIP_HIGHER, "n": 1.0, "m": 2.0, "dual_clip": None}),
    "gppo": Method(gppo, {**CLIP_HIGHER, "dual_clip": None}),
    "ce_gppo": Method(gppo, {**SYMMETRIC, "beta1": 0.75, "beta2": 1.0, "dual_clip": None}),  # of the 7B script
    "cispo": Method(cispo, CLIP_HIGHER),
    "cispo_one_sided": Method(cispo, {"clip_low": 1.0, "clip_high": 0.2}),  # clip_high is verl's; the paper gives none
    "aspo": Method(aspo, {**SYMMETRIC, "soft_clip": 3.0}),
    "grpo": Method(grpo, {**SYMMETRIC, "dual_clip": None}),
    "dr_grpo": Method(grpo, {**SYMMETRIC, "dual_clip": None}, "seq-mean-token-sum-norm"),
    "dapo": Method(grpo, {**CLIP_HIGHER, "dual_clip": None}),
    "gspo": Method(grpo, {"clip_low": 3e-4, "clip_high": 4e-4}, "seq-mean-token-mean", sequence_ratio=True),
    "sapo": Method(sapo, {"tau_pos": 1.0, "tau_neg": 1.05}, "seq-mean-token-mean"),
    "gmpo": Method(gmpo, {"clip_low": 0.4, "clip_high": 0.4}, "seq-mean-token-mean"),
    "reinforce": Method(reinforce, {}),
}

SETTINGS = frozenset(name for method in METHODS.values() for name in method.settings)


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
    published = METHODS[check_method(method)].settings
    return {name: value if settings.get(name) is None else settings[name] for name, value in published.items()}
