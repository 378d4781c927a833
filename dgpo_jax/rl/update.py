"""From packed microbatches to one optimizer step: three programs, each compiled once.

    score       log-probabilities of the weights that sampled, and how far the sampler's own are from them
    accumulate  adds one microbatch's gradient to the sum
    apply       clips the sum, steps AdamW, skips the step if the gradient is not finite

The loss of an update is a sum over all its response tokens divided by their count over all microbatches and devices
(`normaliser`), so that cutting the batch differently, or over more devices, gives the same gradient.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dgpo_jax.rl.logprobs import token_logprobs
from dgpo_jax.rl.losses import leaving_region, observe, resolve_settings, token_loss
from dgpo_jax.types import TrainBatch, TrainState


class LossSettings(NamedTuple):
    """What the loss of an update depends on, besides the batch."""

    method: str
    settings: dict[str, float | None]  # of the method, as `losses.token_loss` takes them
    temperature: float
    logprob_chunk: int  # slots of a row whose logits are held at once


class Totals(NamedTuple):
    """Figures of some tokens that can be merged with those of other tokens."""

    sums: dict[str, Any]  # f32[] each
    maxima: dict[str, Any]  # f32[] each


class Shardings(NamedTuple):
    """Where the arguments and results of the programs live; trees of `jax.sharding.Sharding`."""

    state: TrainState
    batch: TrainBatch
    scalar: Any


class Programs(NamedTuple):
    """The jitted programs of one run."""

    score: Callable  # (params, TrainBatch) -> (logprobs f32[N, T], Totals)
    zero: Callable  # (params) -> (gradients, Totals)
    accumulate: Callable  # (params, (gradients, Totals), TrainBatch, normaliser) -> (gradients, Totals)
    apply: Callable  # (TrainState, gradients, learning_rate) -> (TrainState, StepFigures)


class StepFigures(NamedTuple):
    """What one optimizer step reports."""

    grad_norm: Any  # f32[], before clipping
    skipped: Any  # f32[], 1 where the gradient was not finite and the state was left alone


LOSS_SUMS = ("tokens", "loss", "entropy", "ratio", "kl_old", "too_low", "too_high")
LOSS_MAXIMA = ("ratio", "minus_ratio", "ratio_error")


def make_programs(model, optimizer, loss: LossSettings, shardings: Shardings) -> Programs:
    """Builds the programs of an update.

    Args:
        model: has `hidden(params, tokens, segment, position)` and `unembedding(params)`.
        optimizer: optax transformation without the learning rate (`optimizer.make_optimizer`).
        shardings: every result is pinned to them; left open, layouts drift and the second call compiles again.
    """

    settings = resolve_settings(loss.method, **loss.settings)

    def logprobs_of(params, batch: TrainBatch):
        hidden, _ = model.hidden(params, batch.tokens, batch.segment, batch.position)
        unembedding = model.unembedding(params).astype(hidden.dtype)
        return token_logprobs(
            hidden, unembedding, batch.tokens, temperature=loss.temperature, chunk=loss.logprob_chunk
        )

    def score(params, batch: TrainBatch):
        logprobs, _ = logprobs_of(params, batch)
        return logprobs, gap_totals(logprobs, batch)

    def zero(params):
        gradients = jax.tree.map(jnp.zeros_like, params)
        sums = dict.fromkeys(LOSS_SUMS, jnp.float32(0))
        return gradients, Totals(sums, dict.fromkeys(LOSS_MAXIMA, jnp.float32(-jnp.inf)))

    def accumulate(params, carry, batch: TrainBatch, normaliser):
        def batch_loss(params):
            logprobs, entropy = logprobs_of(params, batch)
            losses = token_loss(
                loss.method, logprobs, batch.old_logprobs, batch.advantages, batch.segment, batch.loss_mask, **settings
            )  # fmt: skip
            losses = losses / normaliser
            return jnp.sum(losses), loss_totals(logprobs, entropy, losses, batch, settings)

        gradients, totals = carry
        new_gradients, new_totals = jax.grad(batch_loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradients, new_gradients), merge_totals(totals, new_totals)

    def apply(state: TrainState, gradients, learning_rate):
        grad_norm = optax.global_norm(gradients)
        finite = jnp.isfinite(grad_norm)
        direction, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda leaf, step: leaf - learning_rate * step, state.params, direction)
        proposed = TrainState(state.update + 1, params, opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
        return state, StepFigures(grad_norm, 1.0 - finite)

    carry = (shardings.state.params, shardings.scalar)
    return Programs(
        score=jax.jit(score, out_shardings=(shardings.batch.old_logprobs, shardings.scalar)),
        zero=jax.jit(zero, out_shardings=carry),
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=carry),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(shardings.state, shardings.scalar)),
    )


def take_update(programs: Programs, state: TrainState, batches: Iterable[TrainBatch], normaliser, learning_rate):
    """One optimizer step from the microbatches of a minibatch.

    Args:
        batches: on the device.
        normaliser: f32[], response tokens of the whole minibatch, those left out of `batches` included.
        learning_rate: f32[].
    Returns:
        (TrainState, Totals, StepFigures), on the device and not waited for. No microbatch at all gives a zero
        gradient: moments and weight decay still move.
    """
    carry = programs.zero(state.params)
    for batch in batches:
        carry = programs.accumulate(state.params, carry, batch, normaliser)
    gradients, totals = carry
    state, figures = programs.apply(state, gradients, learning_rate)
    return state, totals, figures


def loss_totals(logprobs, entropy, losses, batch: TrainBatch, settings: dict) -> Totals:
    """What the policy metrics are made of; masked tokens count nowhere, whatever their values."""
    mask = batch.loss_mask
    logprobs, old_logprobs, entropy = (jnp.where(mask, x, 0.0) for x in (logprobs, batch.old_logprobs, entropy))
    tokens = observe(logprobs, old_logprobs, batch.advantages, batch.segment, mask)
    ratio = jnp.exp(tokens.log_ratio)
    # A method that does not clip has no region to leave.
    region = {"clip_low": settings.get("clip_low", 1.0), "clip_high": settings.get("clip_high", jnp.inf)}
    too_low, too_high = leaving_region(tokens, **region)

    def total(x):
        return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32))

    def largest(x):
        return jnp.max(jnp.where(mask, x, -jnp.inf))

    sums = {
        "tokens": total(mask), "loss": total(losses), "entropy": total(entropy), "ratio": total(ratio),
        "kl_old": total(old_logprobs - tokens.logprobs), "too_low": total(too_low), "too_high": total(too_high),
    }  # fmt: skip
    maxima = {"ratio": largest(ratio), "minus_ratio": largest(-ratio), "ratio_error": largest(jnp.abs(ratio - 1))}
    return Totals(sums, maxima)


def gap_totals(logprobs, batch: TrainBatch) -> Totals:
    """How far the sampler's log-probabilities (in `batch.old_logprobs`) are from the trainer's."""
    gap = jnp.where(batch.loss_mask, jnp.abs(logprobs - batch.old_logprobs), 0.0)
    tokens = jnp.sum(batch.loss_mask, dtype=jnp.float32)
    return Totals({"tokens": tokens, "gap": jnp.sum(gap)}, {"gap": jnp.max(gap)})


def merge_totals(one: Totals, other: Totals) -> Totals:
    """The figures of the tokens of both; works on device and on host."""
    sums = {name: one.sums[name] + other.sums[name] for name in one.sums}
    return Totals(sums, {name: jnp.maximum(one.maxima[name], other.maxima[name]) for name in one.maxima})
