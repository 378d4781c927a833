"""Rewards that do not look at the answer: was the response too long, did it think in the expected form?"""

import numpy as np


def overlong_penalty(lengths, *, max_response, buffer, factor):
    """What a response loses for coming close to the longest allowed; added to its reward.

    Args:
        lengths: i64[B], sampled tokens of each response.
        max_response: tokens, the longest response there can be.
        buffer: tokens before it over which the penalty grows; 0 = no penalty.
        factor: in reward units, the penalty of a response of `max_response` tokens.
    Returns:
        f32[B], min(-(length - (max_response - buffer)) / buffer * factor, 0).
    Raises:
        ValueError: a buffer below 0 or above `max_response`.
    Source: DAPO (arXiv:2503.14476), equation 13, with factor 1.
    """
    if not 0 <= buffer <= max_response:
        raise ValueError(f"overlong: the buffer is {buffer} tokens; it must be from 0 to max_response, {max_response}.")
    lengths = np.asarray(lengths, np.int64)
    if buffer == 0:
        return np.zeros(lengths.shape, np.float32)
    return (np.minimum(max_response - buffer - lengths, 0) / buffer * factor).astype(np.float32)


def format_reward(
    prompt_end: str, response: str, *, no_think_end: float | None, no_think_start: float | None
) -> float | None:
    """The reward of a response that did not think in tags, which replaces the answer's.

    Klear's -0.5 for no </think> is better than its -1 for a wrong answer, as published: a response that was cut off
    loses less than one that finished wrong. Only presence is checked, not order; `extract` reads what comes after the
    last </think>.

    Args:
        prompt_end: the end of the prompt's text, because some templates (R1-Distill) open <think> there. It counts only
            as the last thing but blanks: one elsewhere in the prompt, such as in the question, is not the model's.
        response: text.
        no_think_end: reward if the response holds no </think>, which is looked at first; None = not checked.
        no_think_start: reward if there is no <think>; None = not checked.
    Returns:
        The reward, or None where the answer decides.
    Source: Klear-Reasoner (arXiv:2508.07629), the released code: -0.5 and -2.
    """
    if no_think_end is not None and "</think>" not in response:
        return no_think_end
    opened = prompt_end.rstrip().endswith("<think>") or "<think>" in response
    return None if opened else no_think_start
