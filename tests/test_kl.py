"""Estimates of the distance to the reference, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.rl.kl import MAX_LOG_RATIO, kl_estimate

LOG2, E = np.log(2), np.e
ESTIMATORS = ("k1", "k2", "k3")

# (estimator, log(reference / policy), estimate, its derivative by the policy's log-probability)
BY_HAND = [
    ("k1", 0.0, 0.0, 1.0),
    ("k1", LOG2, -LOG2, 1.0),  # the reference likes the token better: negative
    ("k1", -LOG2, LOG2, 1.0),
    ("k2", 0.0, 0.0, 0.0),
    ("k2", 2.0, 2.0, -2.0),  # d^2 / 2, by log pi -d
    ("k2", -2.0, 2.0, 2.0),
    ("k3", 0.0, 0.0, 0.0),
    ("k3", LOG2, 1 - LOG2, -1.0),  # 2 - log 2 - 1, by log pi 1 - 2
    ("k3", -LOG2, LOG2 - 0.5, 0.5),  # 1/2 + log 2 - 1, by log pi 1 - 1/2
    ("k3", 1.0, E - 2, 1 - E),
]


@pytest.mark.parametrize("estimator, d, expected, slope", BY_HAND)
def test_each_estimator_and_its_gradient_by_hand(estimator, d, expected, slope):
    # The policy's log-probability is anything: only the difference counts.
    value, gradient = jax.value_and_grad(lambda x: kl_estimate(estimator, x, x.dtype.type(d - 1.5)))(jnp.float32(-1.5))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numpy_and_jax_arrays_give_the_same_and_stay_what_they_are(estimator):
    policy, reference = np.random.default_rng(0).normal(-2, 1, (2, 3, 4)).astype(np.float32)
    on_host = kl_estimate(estimator, policy, reference)
    on_device = kl_estimate(estimator, jnp.asarray(policy), jnp.asarray(reference))
    assert type(on_host) is np.ndarray and on_host.dtype == np.float32 and on_host.shape == (3, 4)
    assert isinstance(on_device, jax.Array) and on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, on_host, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(kl_estimate, static_argnums=0)(estimator, policy, reference), on_host, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator, largest, smallest", [
    ("k1", 20.0, -20.0),
    ("k2", 200.0, 200.0),
    ("k3", 19.0, np.expm1(20.0) - 20),  # exp(-20) + 20 - 1, exp(20) - 21
])  # fmt: skip
def test_a_log_ratio_is_clamped_and_pulls_no_more_beyond(estimator, largest, smallest):
    assert MAX_LOG_RATIO == 20
    policy = jnp.array([0.0, -1e4])
    values, pull = jax.vjp(lambda x: kl_estimate(estimator, x, jnp.array([-1e4, 0.0])), policy)
    np.testing.assert_allclose(values, [largest, smallest], rtol=1e-5)
    np.testing.assert_array_equal(pull(jnp.ones(2))[0], [0, 0])


@pytest.mark.parametrize("estimator, unbiased, never_negative", [("k1", True, False), ("k2", False, True), ("k3", True, True)])
def test_means_over_what_the_policy_samples(estimator, unbiased, never_negative):
    # Three tokens: KL = sum p log(p / q), exactly, as every token comes as often as the policy says.
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    estimates = kl_estimate(estimator, np.log(p), np.log(q))
    assert (np.sum(p * estimates) == pytest.approx(np.sum(p * np.log(p / q)))) == unbiased
    assert (estimates.min() >= 0) == never_negative


def test_k2_in_the_loss_has_the_gradient_of_the_kl_and_k1_none():
    # The claim that k1 is refused for: its gradient averages to 0 over the policy's own tokens.
    logits, q = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.2, 0.2, 0.6])
    p = jax.nn.softmax(logits)
    exact = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jnp.log(q))))(logits)
    mean = {
        estimator: jax.grad(lambda x, name=estimator: jnp.sum(p * kl_estimate(name, jax.nn.log_softmax(x), jnp.log(q))))(logits)
        for estimator in ESTIMATORS
    }
    np.testing.assert_allclose(mean["k2"], exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean["k1"], 0, atol=1e-6)
    assert np.abs(mean["k3"] - exact).max() > 1e-3
