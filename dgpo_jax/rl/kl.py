"""Estimates of the distance to the reference weights, of numpy arrays and JAX arrays alike."""

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: beyond it a ratio says only that something is broken; verl clamps there too


def kl_estimate(estimator: str, logprobs, ref_logprobs):
    """Estimates KL(policy || reference) from tokens that the policy sampled.

    Args:
        estimator: with d = log(reference / policy): "k1" is -d, "k2" d^2 / 2, "k3" exp(d) - d - 1. k1 and k3 have the
            right mean, k2 the gradient of the KL; k2 and k3 are never negative.
        logprobs, ref_logprobs: f32[...], nats; differentiable.
    Returns:
        f32[...], nats.
    Source: Schulman, "Approximating KL divergence", 2020.
    """
    d = (ref_logprobs - logprobs).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    return d * d / 2 if estimator == "k2" else d.__array_namespace__().exp(d) - d - 1
