"""What an iteration learns from its rollout: advantages to packed rows to optimizer steps to figures."""

import time
from collections.abc import Sequence

import numpy as np

from dgpo_jax.build import Parts
from dgpo_jax.config import Config
from dgpo_jax.rl.optimizer import learning_rate
from dgpo_jax.rl.packing import pack, split_groups, to_examples
from dgpo_jax.rl.update import LOSS_MAXIMA, LOSS_SUMS, Programs, StepFigures, Totals, take_update
from dgpo_jax.rollout import Responses
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.types import TrainBatch, TrainState


def learn(
    config: Config, parts: Parts, programs: Programs, state: TrainState, responses: Responses, advantages, iteration,
    skipped: int = 0,
):  # fmt: skip
    """All updates of one iteration.

    Args:
        advantages: f32[Q, G].
        iteration: counts from 1.
        skipped: updates skipped in a row just before.
    Returns:
        (TrainState, metrics).
    """
    began = time.perf_counter()
    minibatches = make_minibatches(config, parts, responses, advantages, iteration)
    minibatches, gap = set_old_logprobs(config, programs, state.params, minibatches)
    rate = to_device(np.float32(learning_rate(config.optimizer, iteration - 1)), parts.shardings.scalar)
    results = []
    for normaliser, batches in minibatches:
        state, totals, figures = take_update(programs, state, batches, normaliser, rate)
        results.append((totals, figures))
    results, gap, rate = to_host((results, gap, rate))
    seconds = time.perf_counter() - began
    packed = sum(batch.tokens.size for _, batches in minibatches for batch in batches)
    for _, figures in results:
        skipped = skipped + 1 if figures.skipped else 0
    metrics = policy_metrics(results) | gap_metrics(gap) | {
        "optim/skipped_in_a_row": skipped,
        "optim/learning_rate": float(rate),
        "update/microbatches": sum(len(batches) for _, batches in minibatches),
        "speed/update_tokens_per_second_per_device": packed / seconds / parts.mesh.size,
    }
    return state, metrics


def make_minibatches(config: Config, parts: Parts, responses: Responses, advantages, iteration):
    """One (response tokens f32[], packed microbatches) per update, on the device.

    A group that scored alike has no advantage and is not computed, but its tokens count in the normaliser: leaving
    them out would make an update the larger the fewer groups it learns from.
    """
    group_size, lengths = responses.group_size, responses.lengths
    flat = advantages.reshape(-1)
    rows = config.update.tokens_per_device // config.update.tokens_per_row * parts.replicas
    minibatches = []
    for groups in split_groups(len(advantages), config.update.updates, config.seed, iteration):
        members = (groups[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)
        examples = to_examples(responses.prompts, responses.rollout, flat, members[flat[members] != 0])
        batches = pack(examples, rows=rows, tokens_per_row=config.update.tokens_per_row, pad_id=parts.tokenizer.pad_id)
        normaliser = to_device(np.float32(lengths[members].sum()), parts.shardings.scalar)
        minibatches.append((normaliser, [to_device(batch, parts.shardings.batch) for batch in batches]))
    return minibatches


def set_old_logprobs(config: Config, programs: Programs, params, minibatches):
    """Puts the trainer's log-probabilities of the sampling weights into the batches, if so set.

    Returns:
        (minibatches, list of Totals of the gap to the sampler's; empty under update.old_logprobs='sampler').
    """
    if config.update.old_logprobs == "sampler":
        return minibatches, []
    gaps = []

    def scored(batch: TrainBatch) -> TrainBatch:
        logprobs, gap = programs.score(params, batch)
        gaps.append(gap)
        return batch._replace(old_logprobs=logprobs)

    return [(normaliser, [scored(batch) for batch in batches]) for normaliser, batches in minibatches], gaps


def policy_metrics(results: Sequence[tuple[Totals, StepFigures]]) -> dict[str, float]:
    """Figures over all updates of an iteration; those per token are missing if no group had an advantage.

    Args:
        results: per update, on the host.
    """
    sums = {name: float(sum(totals.sums[name] for totals, _ in results)) for name in LOSS_SUMS}
    maxima = {name: float(max(totals.maxima[name] for totals, _ in results)) for name in LOSS_MAXIMA}
    norms = [float(figures.grad_norm) for _, figures in results]
    metrics = {
        "optim/grad_norm": float(np.mean(norms)),
        "optim/grad_norm_max": max(norms),
        "optim/skipped": float(sum(figures.skipped for _, figures in results)),
        "policy/tokens": sums["tokens"],
    }
    if not sums["tokens"]:
        return metrics
    shares = {name: sums[name] / sums["tokens"] for name in ("entropy", "ratio", "kl_old", "too_low", "too_high")}
    first = results[0][0]
    return metrics | {
        "policy/loss": sums["loss"] / len(results),
        "policy/entropy": shares["entropy"],
        "policy/ratio_mean": shares["ratio"],
        "policy/ratio_max": maxima["ratio"],
        "policy/ratio_min": -maxima["minus_ratio"],
        "policy/kl_old": shares["kl_old"],
        "policy/too_low": shares["too_low"],
        "policy/too_high": shares["too_high"],
        "policy/clipped": shares["too_low"] + shares["too_high"],
        # The first update's ratio is 1: anything but rounding here is a fault of the trainer.
        "policy/first_ratio_error": float(first.maxima["ratio_error"]) if first.sums["tokens"] else None,
    }


def gap_metrics(gaps: Sequence[Totals]) -> dict[str, float]:
    """Mean and largest |sampler's - trainer's| log-probability, in nats; nothing where none was measured."""
    tokens = float(sum(gap.sums["tokens"] for gap in gaps))
    if not tokens:
        return {}
    return {
        "gap/mean": float(sum(gap.sums["gap"] for gap in gaps)) / tokens,
        "gap/max": float(max(gap.maxima["gap"] for gap in gaps)),
    }
