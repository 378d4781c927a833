"""AdamW's first step, its clipping, its decay and its warm-up, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.config import OptimizerConfig
from dgpo_jax.rl.optimizer import learning_rate, make_optimizer

PARAMS = {"matrix": jnp.array([2.0, -2.0]), "scale": jnp.array([4.0])}
DECAYS = {"matrix": True, "scale": False}


def first_direction(config, gradients, decays=DECAYS):
    """What a learning rate of 1 subtracts from PARAMS, and the state."""
    optimizer = make_optimizer(config, decays)
    return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)


def test_the_first_step_of_adam_is_the_sign_of_the_gradient():
    # Moments start at 0 and their bias is corrected: m / sqrt(v) = g / |g|, whatever beta1 and beta2 are.
    config = OptimizerConfig(weight_decay=0.0)
    direction, _ = first_direction(config, {"matrix": jnp.array([0.3, -0.004]), "scale": jnp.array([0.0])})
    np.testing.assert_allclose(direction["matrix"], [1.0, -1.0], rtol=1e-4)
    np.testing.assert_array_equal(direction["scale"], 0)


def test_the_second_step_by_hand():
    # Gradients 0.1 then 0.3, beta1 1/2, beta2 3/4: m = 0.5 * 0.05 + 0.5 * 0.3 = 0.175, over 1 - 1/4 = 0.233333;
    # v = 0.75 * 0.0025 + 0.25 * 0.09 = 0.024375, over 1 - 9/16 = 0.0557143; 0.233333 / 0.236039 = 0.988536.
    optimizer = make_optimizer(OptimizerConfig(beta1=0.5, beta2=0.75, weight_decay=0.0), {"x": True})
    params = {"x": jnp.array([1.0])}
    _, state = optimizer.update({"x": jnp.array([0.1])}, optimizer.init(params), params)
    direction, _ = optimizer.update({"x": jnp.array([0.3])}, state, params)
    np.testing.assert_allclose(direction["x"], 0.988536, rtol=1e-5)


@pytest.mark.parametrize("decay, matrix, scale", [
    ("matrices", [0.2, -0.2], [0.0]),  # 0.1 * 2; the norm's scale is left alone
    ("all", [0.2, -0.2], [0.4]),  # 0.1 * 4
])  # fmt: skip
def test_weight_decay_acts_only_where_it_is_allowed(decay, matrix, scale):
    config = OptimizerConfig(weight_decay=0.1, decay=decay)
    direction, _ = first_direction(config, {"matrix": jnp.zeros(2), "scale": jnp.zeros(1)})
    np.testing.assert_allclose(direction["matrix"], matrix, rtol=1e-6)
    np.testing.assert_allclose(direction["scale"], scale, rtol=1e-6)


@pytest.mark.parametrize("gradient, expected", [
    (([3.0, 0.0], [4.0]), ([0.6, 0.0], [0.8])),  # norm 5 over all parameters, scaled down to 1
    (([0.3, 0.0], [0.4]), ([0.3, 0.0], [0.4])),  # norm 0.5: untouched
])  # fmt: skip
def test_gradients_are_clipped_by_their_global_norm(gradient, expected):
    config = OptimizerConfig(clip_norm=1.0)
    gradients = dict(zip(PARAMS, map(jnp.array, gradient), strict=True))
    _, state = first_direction(config, gradients)
    first_moment = state[1].mu  # (1 - beta1) times what Adam was given
    for name, value in zip(PARAMS, expected, strict=True):
        np.testing.assert_allclose(first_moment[name] / (1 - config.beta1), value, rtol=1e-5)


@pytest.mark.parametrize("warmup, iteration, expected", [
    (10, 0, 0.1),  # the first iteration does not learn at rate 0
    (10, 4, 0.5),
    (10, 9, 1.0),
    (10, 1000, 1.0),
    (1, 0, 1.0),
    (0, 0, 1.0),  # no warm-up
])
def test_the_rate_rises_in_equal_parts_and_then_stays(warmup, iteration, expected):
    config = OptimizerConfig(learning_rate=2e-6, warmup_iterations=warmup)
    assert learning_rate(config, iteration) == pytest.approx(2e-6 * expected)
