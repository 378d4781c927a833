"""The policy losses against the official implementations, their limits, and what may never reach a gradient."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.rl.losses import MAX_LOG_RATIO, METHODS, observe, resolve_settings, token_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "loss_vectors.json").read_text())
CLIP = {"clip_low": GOLDEN["eps_low"], "clip_high": GOLDEN["eps_high"]}

# Name in the file of vectors -> (our method, its settings). A new method needs a line here.
VECTORS = {
    "grpo_c3": ("grpo", {**CLIP, "dual_clip": 3.0}),
    "dgpo_n1_m2": ("dgpo", {**CLIP, "n": 1, "m": 2}),
    "dgpo_n2_m2": ("dgpo", {**CLIP, "n": 2, "m": 2}),
}


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def vectors(name):
    """Columns of the rows of one method: logp_old, ratio, A, loss, derivative of the loss by logp."""
    return np.array([row[1:] for row in GOLDEN["rows"] if row[0] == name]).T


def loss_and_gradient(method, logprobs, old_logprobs, advantages, dtype="float32", **options):
    """Loss and its derivative of each token; the tokens do not interact, so one gradient of the sum gives them all."""
    logprobs, old_logprobs, advantages = (jnp.asarray(x, dtype) for x in (logprobs, old_logprobs, advantages))

    def total(logprobs):
        losses = token_loss(method, logprobs, old_logprobs, advantages, **options)
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    assert losses.dtype == gradient.dtype == dtype
    return np.asarray(losses), np.asarray(gradient)


@pytest.mark.parametrize("dtype, tolerance", [
    ("float64", 1e-6),  # the official masked means add 1e-8
    ("float32", 1e-4),  # exp of a rounded log-ratio drifts by up to 5e-6
])
@pytest.mark.parametrize("name", VECTORS)
def test_value_and_gradient_are_those_of_the_official_code(name, dtype, tolerance):
    method, settings = VECTORS[name]
    old, ratio, advantage, loss, gradient = vectors(name)
    assert len(old) == 48
    with jax.enable_x64(dtype == "float64"):
        ours = loss_and_gradient(method, old + np.log(ratio), old, advantage, dtype, **settings)
    np.testing.assert_allclose(ours[0], loss, rtol=tolerance, atol=1e-30)
    np.testing.assert_allclose(ours[1], gradient, rtol=tolerance, atol=1e-30)


def test_dgpo_contains_gppo():
    # n = -1 makes the left weight r^0 (1 - clip_low), m = 1 the right one r^0 (1 + clip_high): GPPO's constants.
    # GPPO's code also has a dual clip at 10, its paper does not: rows that it touches are left out.
    old, ratio, advantage, loss, gradient = vectors("gppo_c10")
    kept = ~((ratio > 10) & (advantage < 0))
    assert kept.sum() == 44  # of 48: ratios 50 and 1e4, at two old log-probabilities
    with jax.enable_x64(True):
        ours = loss_and_gradient("dgpo", old + np.log(ratio), old, advantage, "float64", **CLIP, n=-1, m=1)
    np.testing.assert_allclose(ours[0][kept], loss[kept], rtol=1e-6)
    np.testing.assert_allclose(ours[1][kept], gradient[kept], rtol=1e-6)


@pytest.mark.parametrize("n, m, ratio, advantage, weight", [
    (1, 2, 0.4, -1.0, 0.2),  # below and pushed further down: 0.4^2 / 0.8
    (2, 2, 0.4, -1.0, 0.1),  # 0.4^3 / 0.8^2
    (1, 2, 0.4, 1.0, 0.4),  # below but pulled back up: plain importance sampling
    (1, 2, 5.12, 1.0, 2.56),  # above and pushed further up: sqrt(5.12 * 1.28)
    (1, 1, 5.12, 1.0, 1.28),  # m = 1 does not grow with the ratio
    (1, 2, 5.12, -1.0, 5.12),  # above but pulled back down; no dual clip
    (1, 2, 1.0, -1.0, 1.0),  # inside
])  # fmt: skip
def test_dgpo_decays_only_tokens_that_leave_the_region(n, m, ratio, advantage, weight):
    loss, gradient = loss_and_gradient("dgpo", [math.log(ratio)], [0.0], [advantage], **CLIP, n=n, m=m)
    np.testing.assert_allclose(loss, -advantage * weight, rtol=1e-6)
    np.testing.assert_allclose(gradient, -advantage * weight, rtol=1e-6)


@pytest.mark.parametrize("method", ["dgpo", "grpo"])
@pytest.mark.parametrize("ratio, advantage, value, gradient", [
    (9.0, -1.0, 9.0, 9.0),  # below the dual clip
    (11.0, -1.0, 10.0, 0.0),  # above it: the loss stays at 10 and pulls no more
    (11.0, 0.0, 0.0, 0.0),  # no advantage, no loss
])
def test_the_dual_clip_takes_the_gradient_of_a_negative_token_far_above(method, ratio, advantage, value, gradient):
    ours = loss_and_gradient(method, [math.log(ratio)], [0.0], [advantage], dual_clip=10.0)
    np.testing.assert_allclose(np.concatenate(ours), [value, gradient], rtol=1e-6)


# Left of the region the reported value r^(n+1) / LB^n falls n + 1 times as fast as its gradient weight says, right of it
# 1 - 1/m times: that factor is what the stop-gradients are for. Inside, value and gradient belong together.
@pytest.mark.parametrize("method, settings, ratio, advantage, factor", [
    ("dgpo", {"n": 1, "m": 2}, 1.1, 1.0, 1.0),
    ("dgpo", {"n": 1, "m": 2}, 0.5, -1.0, 2.0),
    ("dgpo", {"n": 2, "m": 2}, 0.5, -1.0, 3.0),
    ("dgpo", {"n": 1, "m": 2}, 2.0, 1.0, 0.5),
    ("dgpo", {"n": 1, "m": 4}, 2.0, 1.0, 0.75),
    ("grpo", {}, 1.1, -1.0, 1.0),
    ("grpo", {}, 0.5, 1.0, 1.0),
    ("reinforce", {}, 0.5, 1.0, 1.0),
])  # fmt: skip
def test_finite_differences_of_the_value_are_the_gradient_times_the_stopped_factor(
    method, settings, ratio, advantage, factor
):
    at, step = math.log(ratio), 1e-6
    with jax.enable_x64(True):
        points = np.array([at - step, at, at + step])
        loss, gradient = loss_and_gradient(method, points, np.zeros(3), np.full(3, advantage), "float64", **settings)
    np.testing.assert_allclose((loss[2] - loss[0]) / (2 * step), factor * gradient[1], rtol=1e-6)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("bound, advantage", [(0.8, -1.0), (1.28, 1.0)])
def test_dgpo_is_continuous_at_both_bounds(n, m, bound, advantage):
    with jax.enable_x64(True):
        either_side = np.log(bound * np.array([1 - 1e-9, 1 + 1e-9]))
        loss, gradient = loss_and_gradient("dgpo", either_side, [0.0] * 2, [advantage] * 2, "float64", **CLIP, n=n, m=m)
    np.testing.assert_allclose(loss, -advantage * bound, rtol=1e-7)
    np.testing.assert_allclose(gradient, -advantage * bound, rtol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_absurd_ratios_stay_finite(method):
    # In f32 exp overflows at log-ratios of 88.7, and (n + 1) * 69 is above that in the branch that is not taken.
    log_ratio = np.log([1e-30, 1e-30, 1e30, 1e30, 1e-30, 1e30])
    loss, gradient = loss_and_gradient(method, log_ratio, [0.0] * 6, [1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[4:], 0)


def test_beyond_the_clamp_the_ratio_counts_as_e_to_the_20():
    _, gradient = loss_and_gradient("dgpo", [69.0], [0.0], [-1.0])
    np.testing.assert_allclose(gradient, math.exp(MAX_LOG_RATIO), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens_may_hold_anything_and_change_nothing(method):
    mask = np.array([True, False, True, False, False])
    logprobs = np.array([-1.0, np.nan, -2.0, -np.inf, 1e30])
    old_logprobs = np.array([-1.5, np.nan, -1.0, np.inf, np.nan])
    advantages = np.array([1.0, np.nan, -1.0, np.inf, 0.0])
    loss, gradient = loss_and_gradient(method, logprobs, old_logprobs, advantages, mask=jnp.asarray(mask))
    alone = loss_and_gradient(method, logprobs[mask], old_logprobs[mask], advantages[mask])
    np.testing.assert_array_equal(loss[mask], alone[0])
    np.testing.assert_array_equal(gradient[mask], alone[1])
    np.testing.assert_array_equal(np.concatenate([loss[~mask], gradient[~mask]]), 0)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_ratio_of_one_every_method_has_the_same_gradient(method):
    logprobs, advantages = [-0.1, -3.0, -7.0], [2.0, -0.5, 0.0]
    segment = jnp.ones(3, jnp.int32)
    _, gradient = loss_and_gradient(method, logprobs, logprobs, advantages, segment=segment)
    np.testing.assert_allclose(gradient, [-2.0, 0.5, 0.0], rtol=1e-6)


def test_reinforce_reports_the_log_probability_and_ignores_the_ratio():
    loss, gradient = loss_and_gradient("reinforce", [-2.0, -3.0], [-9.0, 0.0], [1.0, -0.5])
    np.testing.assert_allclose(loss, [2.0, -1.5])  # -A * log pi
    np.testing.assert_allclose(gradient, [-1.0, 0.5])


def test_nothing_flows_into_old_logprobs():
    def total(old_logprobs):
        return jnp.sum(token_loss("dgpo", jnp.array([-1.0]), old_logprobs, jnp.array([1.0])))

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([-1.1])), 0)


def test_rules_see_the_log_ratio_clamped():
    tokens = observe(jnp.array([-1.0, -50.0]), jnp.array([-2.0, -1.0]), jnp.array([1.0, 1.0]), None, None)
    np.testing.assert_allclose(tokens.log_ratio, [1.0, -20.0])


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"loss\.method is 'dpgo'.*choose one of dgpo, grpo"):
        token_loss("dpgo", jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))


def test_a_setting_of_no_method_is_refused_by_its_name():
    with pytest.raises(ValueError, match="'clip_hi' is a setting of no method"):
        token_loss("dgpo", jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), clip_hi=0.3)


@pytest.mark.parametrize("given, expected", [
    ({}, {"clip_low": 0.2, "clip_high": 0.28, "n": 1.0, "m": 2.0, "dual_clip": None}),  # as published
    ({"n": 2.0, "m": None}, {"clip_low": 0.2, "clip_high": 0.28, "n": 2.0, "m": 2.0, "dual_clip": None}),
    ({"clip_low": 0.0}, {"clip_low": 0.0, "clip_high": 0.28, "n": 1.0, "m": 2.0, "dual_clip": None}),  # 0 is a value
])
def test_a_setting_left_out_or_none_is_the_published_one(given, expected):
    assert resolve_settings("dgpo", **given) == expected


def test_a_setting_that_only_other_methods_have_is_ignored():
    assert resolve_settings("reinforce", clip_low=0.2) == {}
