"""Advantages: how much better a response is than the others of its group. Host numpy.

Every estimator starts from the rewards minus the mean of their group; they differ in what that is divided by.
"""

import numpy as np


def group_advantages(rewards, mask=None, *, estimator="grpo", std_floor=1e-6):
    """Centres each prompt's rewards on its own group and scales them.

    Args:
        rewards: f32[Q, G], one reward per response.
        mask: bool[Q, G], True where the response counts; None = all do. The others are in no baseline and no deviation.
        estimator: one of ESTIMATORS:
            "grpo": (R - mean) / (std of the group + std_floor).
            "dr_grpo": R - mean; a hard or an easy prompt weighs no more than one half solved.
            "rloo": R - mean of the others of the group, which is n / (n - 1) of "dr_grpo" where n count.
            "reinforce_plus_plus": (R - mean) / (std of that over all responses of the batch that count + std_floor). Per
                response, where verl whitens per token: so the mean is 0 and needs no second subtraction, which would
                give a group that scored alike an advantage, and a long response is not counted more than a short one.
        std_floor: in reward units; keeps nearly equal rewards from being blown up. Unused where no std divides.
    Returns:
        f32[Q, G]; 0 where masked and in a group where `alike` is True. Mean 0 within each group, up to rounding.
    Raises:
        ValueError: G < 2, because a group of one has no baseline; an unknown estimator.
    Source: GRPO (arXiv:2402.03300), section 4.1.2; Dr. GRPO (arXiv:2503.20783); RLOO (arXiv:2402.14740); REINFORCE++
        (arXiv:2501.03262), its variant with a group baseline. A std divides by one less than it counts, as torch.std.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"advantages: {estimator!r} is no estimator; use one of {', '.join(ESTIMATORS)}.")
    rewards, mask = _checked(rewards, mask)
    mean = np.where(mask, rewards, 0).sum(axis=1, keepdims=True) / np.maximum(_count(mask, 1), 1)
    # A group that scored alike must be exactly 0: rounding in the mean would otherwise be divided by std_floor.
    centred = np.where(mask & ~alike(rewards, mask)[:, None], rewards - mean, 0)
    divisor = ESTIMATORS[estimator](centred, mask, std_floor)
    # What is 0 stays 0 without a division: a divisor can be 0 there, as rloo's is for a response that counts alone.
    return np.divide(centred, divisor, out=np.zeros_like(centred), where=centred != 0).astype(np.float32)


def alike(rewards, mask=None):
    """Which groups give no advantage: all rewards that count are equal, or fewer than two count.

    Args:
        rewards, mask: as in `group_advantages`.
    Returns:
        bool[Q].
    """
    rewards, mask = _checked(rewards, mask)
    lowest = np.where(mask, rewards, np.inf).min(axis=1)
    highest = np.where(mask, rewards, -np.inf).max(axis=1)
    return highest <= lowest  # below it where none counts


# What the centred rewards f64[Q, G] (0 where masked) are divided by: f64 that broadcasts to [Q, G].
ESTIMATORS = {
    "grpo": lambda centred, mask, std_floor: _deviation(centred, mask, axis=1) + std_floor,
    "dr_grpo": lambda centred, mask, std_floor: 1.0,
    "rloo": lambda centred, mask, std_floor: 1 - 1 / np.maximum(_count(mask, 1), 1),
    "reinforce_plus_plus": lambda centred, mask, std_floor: _deviation(centred, mask, axis=None) + std_floor,
}


def _deviation(centred, mask, axis):
    return np.sqrt((centred**2).sum(axis=axis, keepdims=True) / np.maximum(_count(mask, axis) - 1, 1))


def _count(mask, axis):
    return mask.sum(axis=axis, keepdims=True)


def _checked(rewards, mask):
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}; expected [Q, G] with G of at least 2 to compare.")
    return rewards, np.ones(rewards.shape, bool) if mask is None else np.asarray(mask, bool)
