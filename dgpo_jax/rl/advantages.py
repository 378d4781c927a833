"""Advantages: how much better a response is than the others of its group. Host numpy."""

import numpy as np


def group_advantages(rewards, mask=None, *, std_floor=1e-6):
    """Centres and scales each prompt's rewards against its own group.

    Args:
        rewards: f32[Q, G], one reward per response.
        mask: bool[Q, G], True where the response counts; None = all do.
        std_floor: in reward units; gives a group that scored alike 0 and not NaN.
    Returns:
        f32[Q, G], mean 0 within each row; 0 where masked, and in a row with fewer than two that count.
    Raises:
        ValueError: G < 2; a group of one has no baseline.
    Source: GRPO (arXiv:2402.03300), section 4.1.2. Divides by G - 1, as the reference's torch.std.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}; expected [Q, G] with G of at least 2 to compare.")
    mask = np.ones(rewards.shape, bool) if mask is None else np.asarray(mask, bool)
    count = mask.sum(axis=1, keepdims=True)
    mean = np.where(mask, rewards, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(mask & (count >= 2), rewards - mean, 0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    # A group that scored alike must be exactly 0: rounding in the mean would otherwise be divided by std_floor.
    alike = np.where(mask, rewards, -np.inf).max(axis=1) == np.where(mask, rewards, np.inf).min(axis=1)
    return np.where(alike[:, None], 0, centred / (std + std_floor)).astype(np.float32)
