"""The policy losses against the official implementations, their limits, and what may never reach a gradient."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.rl.losses import (
    MAX_LOG_RATIO,
    METHODS,
    SETTINGS,
    Regions,
    policy_loss,
    resolve_settings,
    sequence_mean,
    sequence_sum,
    token_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "loss_vectors.json").read_text())
CLIP = {"clip_low": GOLDEN["eps_low"], "clip_high": GOLDEN["eps_high"]}

# Name in the file of vectors -> (our method, its settings). A new method needs a line here if a vector has it.
VECTORS = {
    "grpo_c3": ("grpo", {**CLIP, "dual_clip": 3.0}),
    "cispo": ("cispo", CLIP),
    "gppo_c10": ("gppo", {**CLIP, "dual_clip": 10.0}),
    "ce_gppo_b0.75_1_c10": ("ce_gppo", {**CLIP, "beta1": 0.75, "beta2": 1.0, "dual_clip": 10.0}),
    "aspo_c3": ("aspo", {**CLIP, "soft_clip": 3.0}),
    "gspo_1tok": ("gspo", CLIP),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "gmpo_1tok": ("gmpo", CLIP),
    "dgpo_n1_m2": ("dgpo", {**CLIP, "n": 1, "m": 2}),
    "dgpo_n2_m2": ("dgpo", {**CLIP, "n": 2, "m": 2}),
}

compiled_policy_loss = jax.jit(policy_loss, static_argnums=0, static_argnames=SETTINGS)

SEQUENCE_METHODS = ["gspo", "gmpo"]
CLIPPING_METHODS = [name for name, method in METHODS.items() if "clip_low" in method.settings]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def vectors(name):
    """Columns of the rows of one method: logp_old, ratio, A, loss, derivative of the loss by logp."""
    return np.array([row[1:] for row in GOLDEN["rows"] if row[0] == name]).T


def each_alone(tokens):
    """The segments of a row in which every token is a sequence of its own."""
    return jnp.arange(1, tokens + 1)


@partial(jax.jit, static_argnames=("method", "settings"))
def differentiate(method, settings, logprobs, *arrays):
    def total(logprobs):
        losses = token_loss(method, logprobs, *arrays, **dict(settings))
        return jnp.sum(losses), losses

    return jax.grad(total, has_aux=True)(logprobs)


def loss_and_gradient(
    method, logprobs, old_logprobs, advantages, dtype="float32", *, segment="alone", mask=None, **settings
):
    """Loss of each token and the derivative of their sum."""
    floats = [jnp.asarray(x, dtype) for x in (logprobs, old_logprobs, advantages)]
    segment = each_alone(len(logprobs)) if isinstance(segment, str) else segment
    gradient, losses = differentiate(method, tuple(settings.items()), *floats, segment, mask)
    assert losses.dtype == gradient.dtype == dtype
    return np.asarray(losses), np.asarray(gradient)


def surrogate_at(method, ratios, advantages, *, segment=None, mask=None, **settings):
    """What the rule makes of tokens with these ratios and old log-probabilities of 0, in f32."""
    logprobs, advantages = (jnp.asarray(x, "float32") for x in (np.log(ratios), advantages))
    segment = each_alone(len(ratios)) if segment is None else segment
    mask = jnp.ones(len(ratios), bool) if mask is None else mask
    return compiled_policy_loss(method, logprobs, 0 * logprobs, advantages, segment, mask, **settings)[2]


@pytest.mark.parametrize("dtype, tolerance", [
    ("float64", 1e-6),  # the official masked means add 1e-8
    ("float32", 1e-4),  # exp of a rounded log-ratio drifts by up to 5e-6
])  # fmt: skip
@pytest.mark.parametrize("name", VECTORS)
def test_value_and_gradient_are_those_of_the_official_code(name, dtype, tolerance):
    method, settings = VECTORS[name]
    old, ratio, advantage, loss, gradient = vectors(name)
    assert len(old) == 48
    # The official derivative of SAPO underflows to 0 at ratios of 50 and more, where the true one is 1e-19 and less.
    smallest = 1e-15 if method == "sapo" else 1e-30
    with jax.enable_x64(dtype == "float64"):
        ours = loss_and_gradient(method, old + np.log(ratio), old, advantage, dtype, **settings)
    np.testing.assert_allclose(ours[0], loss, rtol=tolerance, atol=1e-30)
    np.testing.assert_allclose(ours[1], gradient, rtol=tolerance, atol=smallest)


def test_no_official_vector_is_left_out():
    assert {row[0] for row in GOLDEN["rows"]} == set(VECTORS)


def test_gppo_is_dgpo_with_n_of_minus_one_and_m_of_one():
    # n = -1 makes the left weight r^0 (1 - clip_low), m = 1 the right one r^0 (1 + clip_high): GPPO's constants.
    rng = np.random.default_rng(0)
    old, log_ratio, advantages = -rng.exponential(2, 500), rng.normal(0, 2, 500), rng.normal(0, 1, 500)
    with jax.enable_x64(True):
        dgpo = loss_and_gradient("dgpo", old + log_ratio, old, advantages, "float64", n=-1, m=1)
        gppo = loss_and_gradient("gppo", old + log_ratio, old, advantages, "float64")
    np.testing.assert_allclose(dgpo, gppo, rtol=1e-12)


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


@pytest.mark.parametrize("method", [name for name in METHODS if "dual_clip" in METHODS[name].settings])
@pytest.mark.parametrize("ratio, advantage, value, gradient", [
    (9.0, -1.0, 9.0, 9.0),  # below the dual clip
    (11.0, -1.0, 10.0, 0.0),  # above it: the loss stays at 10 and pulls no more
    (11.0, 0.0, 0.0, 0.0),  # no advantage, no loss
])  # fmt: skip
def test_the_dual_clip_takes_the_gradient_of_a_negative_token_far_above(method, ratio, advantage, value, gradient):
    ours = loss_and_gradient(method, [math.log(ratio)], [0.0], [advantage], dual_clip=10.0)
    np.testing.assert_allclose(np.concatenate(ours), [value, gradient], rtol=1e-6)


# Where value and gradient belong together the factor is 1. Elsewhere it is what the stop-gradients are for: left of the
# region DGPO's value r^(n+1) / LB^n falls n + 1 times as fast as its weight says, right of it 1 - 1/m times.
@pytest.mark.parametrize("method, settings, ratio, advantage, factor", [
    ("dgpo", {"n": 1, "m": 2}, 1.1, 1.0, 1.0),
    ("dgpo", {"n": 1, "m": 2}, 0.5, -1.0, 2.0),
    ("dgpo", {"n": 2, "m": 2}, 0.5, -1.0, 3.0),
    ("dgpo", {"n": 1, "m": 2}, 2.0, 1.0, 0.5),
    ("dgpo", {"n": 1, "m": 4}, 2.0, 1.0, 0.75),
    ("grpo", {}, 1.1, -1.0, 1.0),
    ("grpo", {}, 0.5, 1.0, 1.0),
    ("gppo", {}, 1.1, 1.0, 1.0),
    ("gppo", {}, 0.5, -1.0, 0.0),  # the value stays at the bound, the pull does not stop
    ("gppo", {}, 2.0, 1.0, 0.0),
    ("ce_gppo", {}, 1.1, -1.0, 1.0),
    ("ce_gppo", {}, 0.5, -1.0, 0.0),
    ("cispo", {}, 2.0, -1.0, 1.0),  # the bound times log pi
    ("cispo", {}, 1.1, 1.0, 1 + math.log(1.1)),  # the derivative of r log pi is r (1 + log pi), and log pi_old is 0
    ("aspo", {}, 1.1, -1.0, 1.0),
    ("aspo", {}, 1.1, 1.0, -1.0),  # the value 1 / r falls, the weight 1 / r still points up
    ("aspo", {}, 0.2, 1.0, 1.0),  # beyond the soft clip: 3 log pi
    ("aspo", {}, 4.0, -1.0, 1.0),
    ("sapo", {}, 0.3, 1.0, 1.0),  # smooth: the weight is the derivative everywhere
    ("sapo", {}, 3.0, -1.0, 1.0),
    ("gspo", {"clip_low": 0.2}, 0.9, -1.0, 1.0),
    ("gmpo", {}, 0.9, -1.0, 1.0),
    ("reinforce", {}, 0.5, 1.0, 1.0),
])  # fmt: skip
def test_finite_differences_of_the_value_are_the_gradient_times_the_stopped_factor(
    method, settings, ratio, advantage, factor
):
    at, step = math.log(ratio), 1e-6
    with jax.enable_x64(True):
        points = np.array([at - step, at, at + step])
        loss, gradient = loss_and_gradient(method, points, np.zeros(3), np.full(3, advantage), "float64", **settings)
    assert gradient[1] != 0
    np.testing.assert_allclose((loss[2] - loss[0]) / (2 * step), factor * gradient[1], rtol=1e-6)


def gspo_paper(log_ratio, advantage, clip_low, clip_high):
    """GSPO's loss of one sequence (arXiv:2507.18071 eq. 5-7); log_ratio is f64[T]."""
    s = jnp.exp(jnp.mean(log_ratio))
    return -jnp.minimum(s * advantage, jnp.clip(s, 1 - clip_low, 1 + clip_high) * advantage)


def gmpo_paper(log_ratio, advantage, clip_low, clip_high):
    """GMPO's loss of one sequence (arXiv:2507.20673): the advantage times the geometric mean of pessimistic ratios."""
    sign = jnp.sign(advantage)
    pessimistic = sign * jnp.minimum(sign * log_ratio, sign * jnp.clip(log_ratio, -clip_low, clip_high))
    return -advantage * jnp.exp(jnp.mean(pessimistic))


# Log-ratios -0.4, -0.2, 0, 0.2, 0.4 around their mean. GSPO clips all or none, by the mean; GMPO one by one.
@pytest.mark.parametrize("method, paper, settings, mean, advantage, clipped", [
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, -0.45, -1.5, 5),  # log(0.8) = -0.22
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, -0.45, 0.7, 0),
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, 0.05, -1.5, 0),
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, 0.05, 0.7, 0),
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, 0.45, -1.5, 0),
    ("gspo", gspo_paper, {"clip_low": 0.2, "clip_high": 0.28}, 0.45, 0.7, 5),  # log(1.28) = 0.25
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, -0.45, -1.5, 3),  # -0.85, -0.65, -0.45
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, -0.45, 0.7, 0),
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, 0.05, -1.5, 1),  # -0.35
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, 0.05, 0.7, 1),  # 0.45
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, 0.45, -1.5, 0),
    ("gmpo", gmpo_paper, {"clip_low": 0.3, "clip_high": 0.4}, 0.45, 0.7, 3),  # 0.45, 0.65, 0.85
])  # fmt: skip
def test_the_token_mean_of_a_sequence_is_the_loss_of_the_paper(method, paper, settings, mean, advantage, clipped):
    mask = np.array([False, False, True, True, True, True, True])  # two prompt tokens go before those that count
    old, advantages = np.linspace(-3.0, -0.1, 7), np.full(7, advantage)
    logprobs = old + mean + np.array([3.0, -3.0, -0.4, 0.4, 0.0, 0.2, -0.2])
    with jax.enable_x64(True):
        losses, gradient = loss_and_gradient(
            method, logprobs, old, advantages, "float64", segment=None, mask=mask, **settings
        )
        expected = jax.value_and_grad(paper)(jnp.asarray((logprobs - old)[mask]), advantage, **settings)
    np.testing.assert_allclose(np.mean(losses[mask]), expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient[mask] / 5, expected[1], rtol=1e-12)
    assert np.sum(gradient[mask] == 0) == clipped


@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("bound, advantage", [(0.8, -1.0), (1.28, 1.0)])
def test_dgpo_is_continuous_at_both_bounds(n, m, bound, advantage):
    with jax.enable_x64(True):
        either_side = np.log(bound * np.array([1 - 1e-9, 1 + 1e-9]))
        loss, gradient = loss_and_gradient("dgpo", either_side, [0.0] * 2, [advantage] * 2, "float64", **CLIP, n=n, m=m)
    np.testing.assert_allclose(loss, -advantage * bound, rtol=1e-7)
    np.testing.assert_allclose(gradient, -advantage * bound, rtol=1e-7)


@pytest.mark.parametrize("method, settings, below, above", [
    ("gppo", {}, 0.8, 1.28),
    ("ce_gppo", {"beta1": 1.0, "beta2": 1.0}, 0.8, 1.28),
    ("cispo", {}, 0.8, 1.28),
    ("ce_gppo", {"beta1": 0.75, "beta2": 0.5}, 0.6, 0.64),  # jumps from the bound to beta times it
    ("grpo", {}, 0.0, 0.0),
    ("gspo", {}, 0.0, 0.0),
])  # fmt: skip
def test_what_the_weight_is_just_outside_each_bound(method, settings, below, above):
    edges = np.log([0.8 * (1 - 1e-9), 0.8 * (1 + 1e-9), 1.28 * (1 - 1e-9), 1.28 * (1 + 1e-9)])
    advantages = np.array([-1.0, -1.0, 1.0, 1.0])
    with jax.enable_x64(True):
        _, gradient = loss_and_gradient(method, edges, np.zeros(4), advantages, "float64", **CLIP, **settings)
    np.testing.assert_allclose(-gradient * advantages, [below, 0.8, 1.28, above], rtol=1e-7)


TINY, HUGE = math.exp(-MAX_LOG_RATIO), math.exp(MAX_LOG_RATIO)


@pytest.mark.parametrize("method, weights", [
    # ratio 0: A > 0, A < 0; ratio infinite: A > 0, A < 0. "Infinite" is e^20, for the clamp.
    ("dgpo", (TINY, TINY**2 / 0.8, math.sqrt(HUGE * 1.28), HUGE)),
    ("gppo", (TINY, 0.8, 1.28, HUGE)),
    ("ce_gppo", (TINY, 0.75 * 0.8, 1.2, HUGE)),
    ("cispo", (0.8, 0.8, 1.28, 1.28)),
    ("cispo_one_sided", (TINY, TINY, 1.2, 1.2)),
    ("aspo", (3.0, 0.0, 0.0, 3.0)),
    ("grpo", (TINY, 0.0, 0.0, HUGE)),
    ("dr_grpo", (TINY, 0.0, 0.0, HUGE)),
    ("dapo", (TINY, 0.0, 0.0, HUGE)),
    ("gspo", (TINY, 0.0, 0.0, HUGE)),
    ("sapo", (4 * TINY / (2 + 2 * math.cosh(1)), 4 * TINY / (2 + 2 * math.cosh(1.05)), 0.0, 0.0)),  # s(-t) s(t)
    ("gmpo", (TINY, 0.0, 0.0, HUGE)),
    ("reinforce", (1.0, 1.0, 1.0, 1.0)),
])  # fmt: skip
def test_the_limits_of_the_weight_are_finite_and_as_the_papers_have_them(method, weights):
    # In f32 exp overflows at log-ratios of 88.7, and (n + 1) * 69 is above that in the branch that is not taken.
    log_ratio = np.log([1e-30, 1e-30, 1e30, 1e30, 1e-30, 1e30])
    advantages = np.array([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    loss, gradient = loss_and_gradient(method, log_ratio, np.zeros(6), advantages)
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(-gradient * advantages, [*weights, 0.0, 0.0], rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_wider_clamp_stays_finite_and_a_narrower_one_holds_ratios(method):
    log_ratio, advantages = np.array([-100.0, -100.0, 100.0, 100.0]), np.array([1.0, -1.0, 1.0, -1.0])
    for clamp in (80.0, 0.1):
        loss, gradient = loss_and_gradient(method, log_ratio, np.zeros(4), advantages, max_log_ratio=clamp)
        assert np.isfinite(loss).all() and np.isfinite(gradient).all()
    # The value aside, which may hold a log-probability, nothing tells -100 from -0.1 at a clamp of 0.1.
    near = loss_and_gradient(method, log_ratio / 1000, np.zeros(4), advantages)
    np.testing.assert_allclose(gradient, near[1], rtol=1e-6)


def test_plain_importance_weights_reach_as_far_as_the_clamp():
    _, gradient = loss_and_gradient("dgpo", [30.0], [0.0], [-1.0], max_log_ratio=80.0)
    np.testing.assert_allclose(gradient, math.exp(30), rtol=1e-5)


def test_every_method_has_its_limits_tested():
    marks = test_the_limits_of_the_weight_are_finite_and_as_the_papers_have_them.pytestmark
    assert [case[0] for case in marks[0].args[1]] == list(METHODS)


@pytest.mark.parametrize("method", CLIPPING_METHODS)
def test_no_lower_bound_leaves_even_the_least_likely_token_its_ratio(method):
    no_bound = math.inf if method == "gmpo" else 1.0  # GMPO's bounds are on the log-ratio
    loss, gradient = loss_and_gradient(method, np.log([1e-6, 1e-6]), [0.0] * 2, [-1.0, 1.0], clip_low=no_bound)
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(gradient, [1e-6, -3.0 if method == "aspo" else -1e-6], rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99, 1.1])
def test_one_sided_cispo_weighs_unlikely_tokens_by_their_ratio(ratio):
    _, gradient = loss_and_gradient("cispo_one_sided", [math.log(ratio)] * 2, [0.0] * 2, [1.0, -1.0])
    np.testing.assert_allclose(gradient, [-ratio, ratio], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segment", [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])  # the two tokens apart, or in one sequence
def test_masked_tokens_may_hold_anything_and_change_nothing(method, segment):
    mask, segment = np.array([True, False, True, False, False]), np.array(segment)
    logprobs = np.array([-1.0, np.nan, -2.0, -np.inf, 1e30])
    old_logprobs = np.array([-1.5, np.nan, -1.0, np.inf, np.nan])
    advantages = np.array([1.0, np.nan, -1.0, np.inf, 0.0])
    loss, gradient = loss_and_gradient(method, logprobs, old_logprobs, advantages, segment=segment, mask=mask)
    alone = loss_and_gradient(method, logprobs[mask], old_logprobs[mask], advantages[mask], segment=segment[mask])
    np.testing.assert_array_equal(loss[mask], alone[0])
    np.testing.assert_array_equal(gradient[mask], alone[1])
    np.testing.assert_array_equal(np.concatenate([loss[~mask], gradient[~mask]]), 0)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_ratio_of_one_every_method_has_the_same_gradient(method):
    logprobs, advantages = [-0.1, -3.0, -7.0, -1e-4, -90.0], np.array([2.0, -0.5, 0.0, 1.0, -1.0])
    segment, mask = np.ones(5, int), np.ones(5, bool)
    _, gradient = loss_and_gradient(method, logprobs, logprobs, advantages, segment=segment, mask=mask)
    np.testing.assert_array_equal(gradient, -advantages)  # exactly: the weight is 1 and not nearly 1


def packed_example(rng):
    """Rows [2, 9] of sequences of 3 + 4, and 5 + 2 tokens, the rest padding; each sequence's first token is a prompt."""
    segment = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 2, 2, 0, 0]])
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 1, 0, 0]], bool)
    old_logprobs = -rng.exponential(1, (2, 9))
    return old_logprobs + rng.normal(0, 0.5, (2, 9)), old_logprobs, rng.normal(0, 1, (2, 9)), segment, mask


@pytest.mark.parametrize("method", SEQUENCE_METHODS)
def test_packed_sequences_have_the_losses_they_have_alone(method):
    logprobs, old_logprobs, advantages, segment, mask = packed_example(np.random.default_rng(2))
    packed = loss_and_gradient(method, logprobs, old_logprobs, advantages, segment=segment, mask=mask, **CLIP)
    for row, number in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        where = segment[row] == number
        one = (x[row, where] for x in (logprobs, old_logprobs, advantages))
        alone = loss_and_gradient(method, *one, segment=None, mask=mask[row, where], **CLIP)
        assert np.any(alone[0] != 0)
        np.testing.assert_allclose([x[row, where] for x in packed], alone, rtol=1e-6)


@pytest.mark.parametrize("method", SEQUENCE_METHODS)
def test_a_sequence_does_not_reach_its_neighbours(method):
    logprobs, old_logprobs, advantages, segment, mask = packed_example(np.random.default_rng(3))
    changed = (np.arange(2)[:, None] == 0) & (segment == 2)  # the other row has a sequence of that number too
    unclipped = {"clip_low": 10.0, "clip_high": 10.0}  # a token held at its bound would not show the change
    packed, with_change = (
        loss_and_gradient(method, x, old_logprobs, advantages, segment=segment, mask=mask, **unclipped)
        for x in (logprobs, np.where(changed, logprobs - 0.1, logprobs))
    )
    for before, after in zip(packed, with_change, strict=True):
        np.testing.assert_array_equal(before[~changed], after[~changed])
    assert np.all((packed[0] != with_change[0])[changed & mask])


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_without_a_counted_token_has_no_loss(method):
    segment, mask = np.array([1, 1, 2, 2, 0]), np.array([True, True, False, False, False])
    ours = loss_and_gradient(method, [-1.0] * 5, [-1.1] * 5, [1.0] * 5, segment=segment, mask=mask)
    np.testing.assert_array_equal(np.array(ours)[:, 2:], 0)
    assert np.isfinite(ours).all()


def test_sums_and_means_are_of_the_counted_tokens_of_each_sequence_and_row():
    x = jnp.array([[1.0, 2.0, 4.0, jnp.nan], [8.0, 16.0, 32.0, 64.0]])
    segment = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])
    mask = jnp.array([[True, True, True, False], [False, True, False, True]])
    np.testing.assert_array_equal(sequence_sum(x, segment, mask), [[3, 3, 4, 0], [0, 80, 80, 80]])
    np.testing.assert_array_equal(sequence_mean(x, segment, mask), [[1.5, 1.5, 4, 0], [0, 40, 40, 40]])
    np.testing.assert_array_equal(sequence_sum(x, None, mask), [[7] * 4, [80] * 4])  # a row is a sequence
    np.testing.assert_array_equal(sequence_mean(x[1], segment[1], mask[1]), [0, 40, 40, 40])  # a row without a batch


def test_the_mean_of_a_short_sequence_keeps_its_digits_behind_a_long_one():
    # As a difference of running sums in f32 it would be known to 80000 * 6e-8 / 2 = 2e-3, and GSPO clips at 3e-4.
    x = jnp.concatenate([jnp.full(4000, -20.0), jnp.array([1e-4, 5e-4])])
    segment = jnp.where(jnp.arange(4002) < 4000, 1, 2)
    mean = sequence_mean(x, segment, jnp.ones(4002, bool))
    np.testing.assert_allclose(mean[-2:], 3e-4, rtol=1e-6)


LEAVING, ALL, NONE = [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]
# Ratio 0.5 with A > 0 and A < 0, ratio 2 with A > 0 and A < 0, both with A = 0.
OUTSIDE = {"ratios": [0.5, 0.5, 2.0, 2.0, 0.5, 2.0], "advantages": [1.0, -1.0, 1.0, -1.0, 0.0, 0.0]}
OUTSIDE |= {"dual_clip": 1.5, "soft_clip": 1.5}  # for the methods that have one


@pytest.mark.parametrize("method, clipped, dual_clipped", [
    ("dgpo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("gppo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("ce_gppo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("cispo", ALL, NONE),  # whatever the advantage
    ("cispo_one_sided", [0, 0, 1, 1, 0, 1], NONE),
    ("aspo", LEAVING, [1, 0, 0, 1, 0, 0]),  # both its soft clips: 1 / 0.5 and 2 are above 1.5
    ("grpo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("dr_grpo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("dapo", LEAVING, [0, 0, 0, 1, 0, 0]),
    ("gspo", LEAVING, NONE),
    ("sapo", NONE, NONE),
    ("gmpo", [1, 1, 1, 1, 0, 0], NONE),  # also what a step brings back; verl splits them by the sign of A
    ("reinforce", NONE, NONE),
])  # fmt: skip
def test_clipped_tokens_are_those_that_the_reference_code_counts(method, clipped, dual_clipped):
    surrogate = surrogate_at(method, **OUTSIDE)
    np.testing.assert_array_equal(surrogate.clipped, np.array(clipped, bool))
    np.testing.assert_array_equal(surrogate.dual_clipped, np.array(dual_clipped, bool))


@pytest.mark.parametrize("method", METHODS)
def test_regions_tell_leaving_tokens_from_those_on_their_way_back(method):
    low, high = method in CLIPPING_METHODS and method != "cispo_one_sided", method in CLIPPING_METHODS
    expected = Regions(
        too_low=np.array([0, low, 0, 0, 0, 0], bool),
        too_high=np.array([0, 0, high, 0, 0, 0], bool),
        low_reverse=np.array([low, 0, 0, 0, 0, 0], bool),
        high_reverse=np.array([0, 0, 0, high, 0, 0], bool),
    )
    np.testing.assert_array_equal(surrogate_at(method, **OUTSIDE).regions, expected)


@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens_are_counted_nowhere(method):
    # Each would be, by one method or another, were it not masked; and they share their sequence with the one that counts.
    segment, mask = jnp.ones(6, jnp.int32), jnp.arange(6) == 1
    surrogate = surrogate_at(method, **OUTSIDE, segment=segment, mask=mask)
    for counted in (*surrogate.regions, surrogate.clipped, surrogate.dual_clipped):
        assert not counted[~mask].any()
    assert surrogate.regions.too_low[1] == (method in CLIPPING_METHODS and method != "cispo_one_sided")


def test_gspo_judges_tokens_by_their_sequence_but_tells_their_own_ratios():
    log_ratio, advantages = jnp.array([1.0, -1.2]), jnp.array([-1.0, -1.0])
    mask = jnp.ones(2, bool)
    losses, tokens, surrogate = compiled_policy_loss("gspo", log_ratio, jnp.zeros(2), advantages, None, mask)
    np.testing.assert_allclose(losses, [1 - 3e-4] * 2, rtol=1e-6)  # the mean log-ratio is -0.1: held at the bound
    np.testing.assert_allclose(tokens.log_ratio, [1.0, -1.2])
    np.testing.assert_array_equal(surrogate.regions.too_low, [True, True])


def test_gmpo_bounds_the_log_ratio():
    # Between log(1.4) = 0.336 and 0.4, where a bound of 1 + clip_high on the ratio would clip.
    regions = surrogate_at("gmpo", [math.exp(0.39), math.exp(0.41)], [1.0, 1.0]).regions
    np.testing.assert_array_equal(regions.too_high, [False, True])


def test_reinforce_reports_the_log_probability_and_ignores_the_ratio():
    loss, gradient = loss_and_gradient("reinforce", [-2.0, -3.0], [-9.0, 0.0], [1.0, -0.5])
    np.testing.assert_allclose(loss, [2.0, -1.5])  # -A * log pi
    np.testing.assert_allclose(gradient, [-1.0, 0.5])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_flows_into_old_logprobs(method):
    def total(old_logprobs):
        return jnp.sum(token_loss(method, jnp.array([-1.0]), old_logprobs, jnp.array([1.0])))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.array([-1.1])), 0)


def test_metrics_see_the_log_ratio_clamped():
    mask = jnp.ones(2, bool)
    tokens = compiled_policy_loss("dgpo", jnp.array([-1.0, -50.0]), jnp.array([-2.0, -1.0]), jnp.ones(2), None, mask)[1]
    np.testing.assert_allclose(tokens.log_ratio, [1.0, -20.0])


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"loss\.method is 'dpgo'.*choose one of dgpo, gppo"):
        token_loss("dpgo", jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))


def test_a_setting_of_no_method_is_refused_by_its_name():
    with pytest.raises(ValueError, match="'clip_hi' is a setting of no method"):
        token_loss("dgpo", jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), clip_hi=0.3)


@pytest.mark.parametrize("given, expected", [
    ({}, {"clip_low": 0.2, "clip_high": 0.28, "n": 1.0, "m": 2.0, "dual_clip": None}),  # as published
    ({"n": 2.0, "m": None}, {"clip_low": 0.2, "clip_high": 0.28, "n": 2.0, "m": 2.0, "dual_clip": None}),
    ({"clip_low": 0.0}, {"clip_low": 0.0, "clip_high": 0.28, "n": 1.0, "m": 2.0, "dual_clip": None}),  # 0 is a value
])  # fmt: skip
def test_a_setting_left_out_or_none_is_the_published_one(given, expected):
    assert resolve_settings("dgpo", **given) == expected


def test_a_setting_that_only_other_methods_have_is_ignored():
    assert resolve_settings("reinforce", clip_low=0.2) == {}
