"""From packed microbatches to one optimizer step: programs that are each compiled once (`score` once for each dtype of weights).

    score       log-probabilities of given weights: those that sampled, or those that the run started from
    complete    puts the first into a batch, and corrects its advantages for what the sampler did differently
    accumulate  adds one microbatch's gradient to the sum, and marks tokens whose numbers are not finite
    norm        of the sum so far
    apply       clips the sum, steps AdamW; skips the step if the gradient, the loss or a log-probability is not finite

The loss of an update is a sum over the response tokens of all its microbatches and devices. What the sum is divided by
is in the tokens' weights from the start (`aggregation.token_weights`), so that cutting the batch differently, or over
more devices, gives the same gradient:

    sum of  weights * (policy loss + kl * KL - entropy * H)  +  supervised * -log pi
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dgpo_jax.rl.correction import Correction, correction_weights
from dgpo_jax.rl.kl import MAX_LOG_RATIO, kl_estimate
from dgpo_jax.rl.logprobs import token_logprobs
from dgpo_jax.rl.losses import Regions, Surrogate, Tokens, policy_loss, resolve_settings
from dgpo_jax.rl.suspects import LOGPROB, LOSS, Marks
from dgpo_jax.sharding import in_order
from dgpo_jax.types import TrainBatch, TrainState


class LossSettings(NamedTuple):
    """What the loss of an update depends on, besides the batch."""

    method: str
    settings: dict[str, float | None]  # of the method, as `losses.token_loss` takes them
    temperature: float
    logprob_chunk: int  # slots of a device whose logits are held at once
    max_log_ratio: float = MAX_LOG_RATIO  # log-ratios are clamped to it
    kl: float = 0.0  # weight of the distance to the reference; 0 = batches need no reference
    kl_estimator: str = "k3"  # as `kl.kl_estimate` takes it
    entropy: float = 0.0  # weight of the entropy bonus
    correction: Correction = Correction()


class Totals(NamedTuple):
    """Figures of some tokens that can be merged with those of other tokens."""

    sums: dict[str, Any]  # f32[] each, the histogram f32[bins]
    maxima: dict[str, Any]  # f32[] each


class Shardings(NamedTuple):
    """Where the arguments and results of the programs live; trees of `jax.sharding.Sharding`."""

    state: TrainState
    batch: TrainBatch
    scalar: Any


class Programs(NamedTuple):
    """The jitted programs of one run."""

    score: Callable  # (params, TrainBatch) -> logprobs f32[N, T], of tokens in loss_mask; the others' mean nothing
    complete: Callable  # (TrainBatch, logprobs) -> (TrainBatch, Totals)
    zero: Callable  # (params) -> (gradients, Totals)
    accumulate: Callable  # (params, (gradients, Totals), TrainBatch) -> (gradients, Totals, Marks.tokens)
    norm: Callable  # (gradients) -> f32[]
    apply: Callable  # (TrainState, gradients, Totals, learning_rate) -> (TrainState, StepFigures)


class StepFigures(NamedTuple):
    """What one optimizer step reports."""

    grad_norm: Any  # f32[], before clipping
    skipped: Any  # f32[], 1 where something was not finite and the state was left alone


# Ratios that the histogram tells apart: below the first, between neighbours, above the last.
HISTOGRAM_EDGES = (0.1, 0.25, 0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.28, 2.0, 4.0, 10.0)

LOSS_SUMS = (
    "tokens", "objective", "not_finite", "loss", "entropy", "ratio", "kl_old", "kl_ref", "supervised", "clipped", "dual_clipped", "histogram",
    *Regions._fields, *(f"{name}_weight" for name in Regions._fields),
)  # fmt: skip
LOSS_MAXIMA = ("ratio", "minus_ratio", "ratio_error", *(f"{name}_weight" for name in Regions._fields))


def make_programs(model, optimizer, loss: LossSettings, shardings: Shardings) -> Programs:
    """Builds the programs of an update.

    Args:
        model: has `hidden(params, tokens, segment, position)`, `unembedding(params)` and `mesh`.
        optimizer: optax transformation without the learning rate (`optimizer.make_optimizer`).
        shardings: every result is pinned to them; left open, layouts drift and the second call compiles again.
    """

    settings = resolve_settings(loss.method, **loss.settings)

    def logprobs_of(params, batch: TrainBatch):
        hidden = model.hidden(params, batch.tokens, batch.segment, batch.position)
        unembedding = model.unembedding(params).astype(hidden.dtype)
        return token_logprobs(
            hidden, unembedding, batch.tokens, batch.loss_mask, temperature=loss.temperature, chunk=loss.logprob_chunk,
            entropy_gradient=loss.entropy > 0, mesh=model.mesh,
        )  # fmt: skip

    def score(params, batch: TrainBatch):
        return logprobs_of(params, batch)[0]

    def complete(batch: TrainBatch, logprobs):
        old_logprobs = jnp.where(jnp.isnan(batch.old_logprobs), logprobs, batch.old_logprobs)
        old_logprobs = jnp.where(batch.loss_mask, old_logprobs, 0.0)
        log_ratio = jnp.where(batch.loss_mask, old_logprobs - batch.sampler_logprobs, 0.0)
        # The policy loss is linear in the advantage, and only its sign chooses a branch.
        weights = correction_weights(loss.correction, log_ratio, batch.segment, batch.loss_mask)
        batch = batch._replace(old_logprobs=old_logprobs, advantages=batch.advantages * weights)
        return batch, gap_totals(log_ratio, weights, batch.loss_mask)

    def zero(params):
        gradients = jax.tree.map(jnp.zeros_like, params)
        sums = dict.fromkeys(LOSS_SUMS, jnp.float32(0)) | {"histogram": jnp.zeros(len(HISTOGRAM_EDGES) + 1)}
        return gradients, Totals(sums, dict.fromkeys(LOSS_MAXIMA, jnp.float32(-jnp.inf)))

    def batch_loss(params, batch: TrainBatch):
        logprobs, entropy = logprobs_of(params, batch)
        logprobs, entropy = (jnp.where(batch.loss_mask, x, 0.0) for x in (logprobs, entropy))
        policy, tokens, surrogate = policy_loss(
            loss.method, logprobs, batch.old_logprobs, batch.advantages, batch.segment, batch.loss_mask,
            max_log_ratio=loss.max_log_ratio, **settings,
        )  # fmt: skip
        objective = batch.weights * policy - batch.supervised * logprobs
        kl = jnp.zeros_like(logprobs)
        if loss.kl:
            kl = kl_estimate(loss.kl_estimator, logprobs, jnp.where(batch.loss_mask, batch.ref_logprobs, 0.0))
            objective += loss.kl * batch.weights * kl
        if loss.entropy:
            objective -= loss.entropy * batch.weights * entropy
        marks = mark_tokens(logprobs, batch.old_logprobs, objective, batch.loss_mask)
        per_token = {
            "loss": batch.weights * policy, "supervised": -batch.supervised * logprobs, "kl_ref": kl, "entropy": entropy,
            "objective": objective, "not_finite": marks > 0,
        }  # fmt: skip
        return jnp.sum(objective), (loss_totals(batch, tokens, surrogate, per_token), marks)

    def accumulate(params, carry, batch: TrainBatch):
        gradients, totals = carry
        new_gradients, (new_totals, marks) = jax.grad(batch_loss, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, gradients, new_gradients), merge_totals(totals, new_totals), marks

    def norm(gradients):
        # Not in accumulate: with one reader more XLA fuses the new gradient otherwise, and its last bits change.
        return optax.global_norm(gradients)

    @jax.named_scope("optimizer")
    def apply(state: TrainState, gradients, totals: Totals, learning_rate):
        grad_norm = optax.global_norm(gradients)
        # Each by itself: a rule that clips does not read a log-probability that is far out, and passes nothing of it on.
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(totals.sums["objective"]) & (totals.sums["not_finite"] == 0)
        direction, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda leaf, step: leaf - learning_rate * step, state.params, direction)
        proposed = TrainState(state.update + 1, params, opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
        return state, StepFigures(grad_norm, 1.0 - finite)

    carry = (shardings.state.params, shardings.scalar)
    programs = Programs(
        score=jax.jit(score, out_shardings=shardings.batch.old_logprobs),
        complete=jax.jit(complete, out_shardings=(shardings.batch, shardings.scalar)),
        zero=jax.jit(zero, out_shardings=carry),
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=(*carry, shardings.batch.tokens)),
        norm=jax.jit(norm, out_shardings=shardings.scalar),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(shardings.state, shardings.scalar)),
    )
    return Programs(*map(in_order, programs))


def take_update(programs: Programs, state: TrainState, batches: Iterable[TrainBatch], learning_rate):
    """One optimizer step from the microbatches of a minibatch.

    Args:
        batches: on the device.
        learning_rate: f32[].
    Returns:
        (TrainState, Totals, StepFigures), on the device and not waited for. No microbatch at all gives a zero
        gradient: moments and weight decay still move.
    """
    return take_marked_update(programs, state, batches, learning_rate)[:3]


def take_marked_update(
    programs: Programs, state: TrainState, batches: Iterable[TrainBatch], learning_rate, between: Callable[[], object] = lambda: None
):
    """The same; returns a list of the Marks of each microbatch besides, for `suspects.find_suspects`.

    Args:
        between: called before each microbatch, while the device is at most two behind. It may raise: until the last
            microbatch is done `state` is as it was.
    """
    gradients, totals = programs.zero(state.params)
    marks = []
    for batch in batches:
        keep_pace(marks)
        between()
        gradients, totals, tokens = programs.accumulate(state.params, (gradients, totals), batch)
        marks.append(Marks(tokens, programs.norm(gradients)))
    state, figures = programs.apply(state, gradients, totals, learning_rate)
    return state, totals, figures, marks


def keep_pace(results: Sequence) -> None:
    """Waits for the device until it is at most two microbatches behind the host, so that what is said between them is true.

    Args:
        results: on the device, one of each microbatch so far.
    """
    if len(results) > 1:
        jax.block_until_ready(results[-2])


def mark_tokens(logprobs, old_logprobs, objective, mask):
    """u8[N, T]: LOGPROB and LOSS where a token's own is not finite; 0 where masked.

    A loss whose old log-probability is infinite counts as not finite: only the clamp of the log-ratio hides it.
    """
    sound = jnp.isfinite(objective) & jnp.isfinite(old_logprobs)
    bits = ~jnp.isfinite(logprobs) * jnp.uint8(LOGPROB) + ~sound * jnp.uint8(LOSS)
    return jnp.where(mask, bits, jnp.uint8(0))


def loss_totals(batch: TrainBatch, tokens: Tokens, surrogate: Surrogate, per_token: dict[str, Any]) -> Totals:
    """What the policy metrics are made of; masked tokens count nowhere, whatever their values.

    Args:
        tokens, surrogate: as `losses.policy_loss` gives them.
        per_token: further figures f32[N, T] to be summed.
    """
    mask, ratio = batch.loss_mask, jnp.exp(tokens.log_ratio)

    def total(x, mask=mask):
        return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32))

    def largest(x, mask=mask):
        return jnp.max(jnp.where(mask, x, -jnp.inf))

    in_regions = surrogate.regions._asdict()
    above = [total(ratio > edge) for edge in (-1.0, *HISTOGRAM_EDGES, jnp.inf)]
    sums = (
        {name: total(x) for name, x in per_token.items()}
        | {name: total(inside) for name, inside in in_regions.items()}
        | {f"{name}_weight": total(surrogate.weight, inside) for name, inside in in_regions.items()}
        | {
            "tokens": total(mask), "ratio": total(ratio), "kl_old": total(batch.old_logprobs - tokens.logprobs),
            "clipped": total(surrogate.clipped), "dual_clipped": total(surrogate.dual_clipped),
            "histogram": -jnp.diff(jnp.stack(above)),
        }
    )  # fmt: skip
    maxima = {f"{name}_weight": largest(surrogate.weight, inside) for name, inside in in_regions.items()} | {
        "ratio": largest(ratio), "minus_ratio": largest(-ratio), "ratio_error": largest(jnp.abs(ratio - 1)),
    }  # fmt: skip
    return Totals(sums, maxima)


def gap_totals(log_ratio, weights, mask) -> Totals:
    """How far the sampler's log-probabilities are from the trainer's, and what was done about it.

    Args:
        log_ratio: f32[N, T], trainer's less sampler's; 0 where masked.
        weights: f32[N, T], what advantages were multiplied by.
    """
    gap = jnp.abs(log_ratio)
    counted = mask.astype(jnp.float32)
    sums = {
        "tokens": jnp.sum(counted), "gap": jnp.sum(gap), "weight": jnp.sum(weights * counted),
        "rejected": jnp.sum(counted * (weights == 0)),
    }  # fmt: skip
    return Totals(sums, {"gap": jnp.max(gap), "weight": jnp.max(weights * counted)})


def merge_totals(one: Totals, other: Totals) -> Totals:
    """The figures of the tokens of both; works on device and on host."""
    sums = {name: one.sums[name] + other.sums[name] for name in one.sums}
    return Totals(sums, {name: jnp.maximum(one.maxima[name], other.maxima[name]) for name in one.maxima})
