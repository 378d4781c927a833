"""What the updates of an iteration report, summed up on the host."""

from collections.abc import Sequence

import numpy as np

from dgpo_jax.rl.losses import Regions
from dgpo_jax.rl.update import LOSS_MAXIMA, LOSS_SUMS, StepFigures, Totals


def policy_metrics(results: Sequence[tuple[Totals, StepFigures]], fresh: bool, terms: Sequence[str] = ()) -> dict[str, float]:
    """Figures over all updates of an iteration; those per token are missing if there was no token to learn from.

    Args:
        results: per update, on the host.
        fresh: the weights before the first update are those that sampled.
        terms: of "kl_ref" and "supervised", those that are part of the loss.
    """
    sums = {name: sum(totals.sums[name] for totals, _ in results) for name in LOSS_SUMS}
    maxima = {name: float(np.max([totals.maxima[name] for totals, _ in results])) for name in LOSS_MAXIMA}
    norms = [float(figures.grad_norm) for _, figures in results]
    tokens = float(sums["tokens"])
    metrics = {
        "optim/grad_norm": float(np.mean(norms)),
        "optim/grad_norm_max": float(np.max(norms)),
        "optim/skipped": float(sum(figures.skipped for _, figures in results)),
        "policy/tokens": tokens,
    }
    if sums["not_finite"]:
        metrics["optim/tokens_not_finite"] = float(sums["not_finite"])
    if not tokens:
        return metrics
    per_token = ["entropy", "kl_old", "clipped", "dual_clipped", *Regions._fields] + ["kl_ref"] * ("kl_ref" in terms)
    per_update = ["loss"] + ["supervised"] * ("supervised" in terms)
    metrics |= {f"policy/{name}": float(sums[name]) / tokens for name in per_token}
    metrics |= {f"policy/{name}": float(sums[name]) / len(results) for name in per_update}
    metrics |= {
        "policy/ratio_mean": float(sums["ratio"]) / tokens,
        "policy/ratio_max": maxima["ratio"],
        "policy/ratio_min": -maxima["minus_ratio"],
        "policy/ratio_histogram": (sums["histogram"] / tokens).tolist(),
    }
    for name in Regions._fields:
        if sums[name]:
            metrics[f"policy/{name}_weight_mean"] = float(sums[f"{name}_weight"] / sums[name])
            metrics[f"policy/{name}_weight_max"] = maxima[f"{name}_weight"]
    first = results[0][0]
    if fresh and first.sums["tokens"]:
        # The first update's ratio is 1, or the gap to the sampler where old_logprobs is its: anything but rounding is a fault.
        metrics["policy/first_ratio_error"] = float(first.maxima["ratio_error"])
    return metrics


def gap_metrics(gaps: Sequence[Totals]) -> dict[str, float]:
    """Mean and largest |sampler's - trainer's| log-probability, in nats, and the correction made for it.

    Empty where none was measured.
    """
    sums = {name: float(sum(gap.sums[name] for gap in gaps)) for name in ("tokens", "gap", "weight", "rejected")}
    if not sums["tokens"]:
        return {}
    return {
        "gap/mean": sums["gap"] / sums["tokens"],
        "gap/max": float(max(gap.maxima["gap"] for gap in gaps)),
        "gap/weight_mean": sums["weight"] / sums["tokens"],
        "gap/weight_max": float(max(gap.maxima["weight"] for gap in gaps)),
        "gap/rejected": sums["rejected"] / sums["tokens"],
    }
