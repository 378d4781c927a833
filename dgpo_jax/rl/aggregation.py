"""From losses of tokens to the loss of an update: what one token of each response weighs. Host numpy.

Weights are for all responses of one update, over all its microbatches and devices, so that the gradient depends on
neither. They are known before the first backward pass, because lengths are.
"""

import numpy as np

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def token_weights(lengths, counted, mode, scale):
    """The weights with which the loss of an update is the sum over its tokens of weight times token loss.

    Args:
        lengths: i64[B], sampled tokens of each response.
        counted: bool[B], True = the response is learned from. One of length 0 never is.
        mode: one of MODES; n responses count, with `tokens` among them:
            "token-mean": 1 / tokens, as DAPO (arXiv:2503.14476); long responses weigh more.
            "seq-mean-token-sum": 1 / n.
            "seq-mean-token-mean": 1 / (n * length), as GRPO (arXiv:2402.03300); every response weighs the same.
            "seq-mean-token-sum-norm": 1 / (n * scale), as Dr. GRPO (arXiv:2503.20783), whose objective has the mean
                over the group. verl's main divides by the scale alone, so its loss is n times this one: its learning
                rate or its scale has to be converted.
        scale: in tokens, the constant of the last mode, such as the response slots; the other modes ignore it.
    Returns:
        f64[B]; 0 for a response that does not count, and everywhere if none does.
    Raises:
        ValueError: an unknown mode; the last mode with a scale that is not above 0.
    """
    if mode not in MODES:
        raise ValueError(f"aggregation: {mode!r} is no mode; use one of {', '.join(MODES)}.")
    if mode == "seq-mean-token-sum-norm" and not scale > 0:
        raise ValueError(
            f"aggregation: the scale of {mode} is {scale}; it must be above 0, such as the response slots."
        )
    lengths = np.asarray(lengths, np.int64)
    counted = np.asarray(counted, bool) & (lengths > 0)
    sequences = counted.sum()
    match mode:
        case "token-mean":
            divisor = lengths[counted].sum()
        case "seq-mean-token-sum":
            divisor = sequences
        case "seq-mean-token-mean":
            divisor = sequences * lengths
        case "seq-mean-token-sum-norm":
            divisor = sequences * scale
    return np.divide(1.0, divisor, out=np.zeros(lengths.shape), where=counted)
