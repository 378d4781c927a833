"""How fast an iteration was, in tokens and in model FLOPs, on each device and as a share of what the chip can do."""

from collections.abc import Sequence

import numpy as np

from dgpo_jax.build import Parts
from dgpo_jax.config import Config
from dgpo_jax.hardware import device_chip
from dgpo_jax.learning import to_compute
from dgpo_jax.models.flops import rollout_flops, training_flops
from dgpo_jax.rl.experience import group_size, lengths
from dgpo_jax.types import Experience


def rollout_work(parts: Parts, experiences: Sequence[Experience]) -> dict[str, float]:
    """`rollout/tflop`: model FLOPs of sampling these draws, in units of 1e12.

    Each draw counts its prompts once, so that a sampler that runs a prompt for every sample is slower and not busier.
    """
    flops = (
        rollout_flops(parts.model.config, draw.prompts.mask.sum(axis=1), lengths(draw)) for draw in experiences
    )
    return {"rollout/tflop": sum(flops) / 1e12}


def update_work(config: Config, parts: Parts, experience: Experience, advantages: np.ndarray) -> dict[str, float]:
    """`update/tokens` and `update/tflop` of the responses that an iteration learned from, prompts included.

    Scoring them before the first update counts, with the weights that sampled and with the reference, where the
    settings ask for it: it is part of `time/update`.

    Args:
        advantages: f32[Q, G].
    """
    computed = to_compute(config, experience, advantages)
    prompts = np.repeat(experience.prompts.mask.sum(axis=1), group_size(experience))[computed]
    responses = lengths(experience)[computed]
    scorings = (config.update.old_logprobs == "trainer") + config.kl.in_loss
    return {
        "update/tokens": float(prompts.sum() + responses.sum()),
        "update/tflop": training_flops(parts.model.config, prompts, responses, scorings) / 1e12,
    }


def speed_metrics(config: Config, parts: Parts, metrics: dict[str, float]) -> dict[str, float]:
    """Rates of an iteration per device, and as a share of the peak where there is one: `find_peak`.

    Args:
        metrics: of the iteration; tokens and seconds and tflop of both phases.
    """
    peak, found = find_peak(config, parts), {}
    for phase in ("rollout", "update"):
        seconds = metrics[f"time/{phase}"] * parts.mesh.size
        found[f"speed/{phase}_tokens_per_second_per_device"] = metrics[f"{phase}/tokens"] / seconds
        rate = metrics[f"{phase}/tflop"] / seconds
        found[f"speed/{phase}_tflops_per_device"] = rate
        found |= {f"speed/{phase}_mfu": rate / peak} if peak else {}
    return found


def find_peak(config: Config, parts: Parts) -> float | None:
    """What one device can do, in 1e12 FLOP/s: `peak_tflops`, else the chip's own; None for one that is not listed."""
    chip = device_chip(parts.mesh.devices.flat[0])
    return config.peak_tflops or (chip.flops / 1e12 if chip else None)
