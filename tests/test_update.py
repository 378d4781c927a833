"""The programs of an update: one gradient however the batch is cut and wherever it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import Unigram
from tiny import CONFIG, MESHES, rows_sharding, tiny_model, tiny_params

from dgpo_jax.build import build_shardings
from dgpo_jax.config import OptimizerConfig
from dgpo_jax.models.parameters import decays
from dgpo_jax.rl.correction import Correction
from dgpo_jax.rl.losses import Regions
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.packing import Example, Shape, empty_batch, fill, lay_out, pack
from dgpo_jax.rl.suspects import find_suspects
from dgpo_jax.rl.update import (
    HISTOGRAM_EDGES,
    LOSS_MAXIMA,
    LOSS_SUMS,
    LossSettings,
    Shardings,
    make_programs,
    merge_totals,
    take_marked_update,
    take_update,
)
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.stopping import Stop
from dgpo_jax.types import TrainBatch, TrainState

# Every term of the loss at once: whatever holds for the sum holds for each.
EVERYTHING = LossSettings(
    "dgpo", {"clip_low": 0.2, "clip_high": 0.28}, temperature=0.8, logprob_chunk=8, kl=0.1, kl_estimator="k3", entropy=0.1,
    correction=Correction("token", reject="sequence", low=1e-3, high=1e3),
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_iterations=0)
RATE = 0.01


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


class Trainer:
    """Model, programs and a way to feed them, on one mesh."""

    def __init__(self, mesh_name):
        self.mesh_name, self.model = mesh_name, tiny_model(mesh_name)
        self.optimizer = make_optimizer(OPTIMIZER, decays(CONFIG))
        self.shardings = build_shardings(self.model, self.optimizer)
        self.programs = make_programs(self.model, self.optimizer, EVERYTHING, self.shardings)

    def state(self):
        """A fresh one each time: an update takes the old one's memory."""
        params = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=self.shardings.state.params)(
            tiny_params(self.mesh_name)
        )
        start = jax.jit(self.optimizer.init, out_shardings=self.shardings.state.opt_state)
        return TrainState(to_device(np.int32(0), self.shardings.scalar), params, start(params))

    def place(self, batches):
        return [to_device(batch, self.shardings.batch) for batch in batches]

    def scalar(self, number):
        return to_device(np.float32(number), self.shardings.scalar)

    def gradient(self, batches):
        """(gradients, Totals) of the weights of tiny_params, on the host."""
        params = tiny_params(self.mesh_name)
        carry = self.programs.zero(params)
        for batch in self.place(batches):
            *carry, _ = self.programs.accumulate(params, tuple(carry), batch)
        return to_host(tuple(carry))

    def complete(self, params, batches):
        """As before the first update of an iteration: ([TrainBatch], [Totals]), on the device."""
        return zip(
            *[self.programs.complete(batch, self.programs.score(params, batch)) for batch in self.place(batches)], strict=True
        )

    def update(self, state, batches, rate=RATE):
        return take_update(self.programs, state, self.place(batches), self.scalar(rate))


@functools.cache
def make_trainer(mesh_name):
    return Trainer(mesh_name)


@pytest.fixture(params=MESHES)
def trainer(request):
    return make_trainer(request.param)


@pytest.fixture
def alone():
    return make_trainer("one device")


def make_examples(count=10, seed=0):
    """Sequences of uneven length whose old log-probabilities put ratios on both sides of the region.

    Each sequence weighs the same, its tokens accordingly; every third counts for the supervised term.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        response = rng.integers(1, 64, 1 + index).astype(np.int32)
        prompt = rng.integers(1, 64, 1 + index % 4).astype(np.int32)
        sampler_logprobs, old_logprobs = rng.uniform(-6, -2, (2, len(response))).astype(np.float32)
        weight, supervised = 1 / (count * len(response)), 0.02 * (index % 3 == 0)
        examples.append(Example(prompt, response, sampler_logprobs, old_logprobs, float(rng.normal()), weight, supervised))
    return examples


EXAMPLES = make_examples()
TOKENS = 55  # 1 + 2 + ... + 10 response tokens


def assert_trees_close(ours, expected):
    """To rounding, which is relative to the largest number of each array."""

    def close(ours, expected):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    jax.tree.map(close, ours, expected)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(to_host(tree))))


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, to_host(one), to_host(other))


def pack_all(examples, rows=8):
    """Microbatches of 8 rows of 20 slots: one shape in all tests of the tiny model, so that nothing compiles again.

    The sampler's log-probabilities stand for the reference's too; only the tokens they belong to matter here.
    """
    batches = pack(examples, rows=rows, tokens_per_row=20)
    return [batch._replace(ref_logprobs=batch.sampler_logprobs) for batch in batches]


def unscored(batch):
    """The batch as it comes from the host: old log-probabilities yet to be computed."""
    return batch._replace(old_logprobs=np.where(batch.loss_mask, np.nan, 0).astype(np.float32))


@functools.cache
def gradient_of_the_whole():
    """Gradient and figures of all examples in one microbatch on one device."""
    (batch,) = pack_all(EXAMPLES)
    assert batch.segment.max() >= 2  # sequences do share rows
    return make_trainer("one device").gradient([batch])


@pytest.fixture
def whole():
    return gradient_of_the_whole()


def test_the_examples_reach_every_branch_of_the_loss(whole):
    # Otherwise the tests below would say little.
    assert whole[1].sums["tokens"] == TOKENS
    assert all(whole[1].sums[name] > 0 for name in Regions._fields)
    assert whole[1].sums["supervised"] > 0 and whole[1].sums["kl_ref"] > 0
    assert norm(whole[0]) > 0.1


CUTS = {
    "two microbatches": [*pack_all(EXAMPLES[:7]), *pack_all(EXAMPLES[7:])],
    "a microbatch each": [batch for example in EXAMPLES for batch in pack_all([example])],
    "in another order": pack_all(EXAMPLES[::-1]),
    "a row each": [
        jax.tree.map(
            lambda *rows: np.concatenate(rows),
            *[pack_all([example], rows=1)[0] for example in part],
            empty_batch(8 - len(part), 20),
        )
        for part in (EXAMPLES[:7], EXAMPLES[7:])
    ],
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(trainer, whole, cut):
    gradient, totals = trainer.gradient(CUTS[cut])
    assert_trees_close(gradient, whole[0])
    assert_trees_close(totals, whole[1])


@functools.cache
def four_updates(mesh_name):
    """The state after them, on the host."""
    trainer = make_trainer(mesh_name)
    state = trainer.state()
    for minibatch in (CUTS["two microbatches"], CUTS["two microbatches"][1:]):
        completed, _ = trainer.complete(state.params, minibatch)
        for batches in (completed, trainer.place(minibatch)):  # with the trainer's log-probabilities, and with the sampler's
            state, _, figures = take_update(trainer.programs, state, batches, trainer.scalar(RATE))
            assert float(figures.skipped) == 0
    return to_host(state)


def test_four_updates_compile_each_program_once_and_end_at_the_same_weights_on_every_mesh(trainer):
    ours, expected = four_updates(trainer.mesh_name), four_updates("one device")
    counts = {name: program._cache_size() for name, program in trainer.programs._asdict().items()}
    assert counts == {"score": 1, "complete": 1, "zero": 1, "accumulate": 1, "norm": 1, "apply": 1}
    assert ours.update == expected.update == 4
    # Where a gradient is nothing but rounding, Adam still steps by its sign: such weights may end some steps apart.
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(expected.params), strict=True):
        assert np.mean(np.abs(one - other) < 1e-5) > 0.99
        assert np.abs(one - other).max() <= 8 * RATE


def test_the_first_ratio_after_score_is_one_to_rounding(trainer):
    params = tiny_params(trainer.mesh_name)
    (host,) = pack_all(EXAMPLES)
    (batch,), (gap,) = trainer.complete(params, [unscored(host)])
    carry = trainer.programs.accumulate(params, trainer.programs.zero(params), batch)
    totals = to_host(carry[1])
    assert totals.maxima["ratio_error"] < 1e-6
    assert totals.sums["too_low"] == totals.sums["too_high"] == 0
    np.testing.assert_allclose(totals.sums["ratio"], TOKENS, rtol=1e-6)
    gaps = np.abs(to_host(batch.old_logprobs) - host.sampler_logprobs)[host.loss_mask]
    np.testing.assert_allclose([gap.sums["gap"], gap.maxima["gap"]], [gaps.sum(), gaps.max()], rtol=1e-5)
    assert gap.sums["tokens"] == TOKENS


def test_only_log_probabilities_that_are_missing_are_filled_in(alone):
    (host,) = pack_all(EXAMPLES)
    missing = host.loss_mask & (host.segment == 1)  # the first sequence of each row, as if the others had waited
    assert missing.any() and (host.loss_mask & ~missing).any()
    host = host._replace(old_logprobs=np.where(missing, np.nan, host.old_logprobs).astype(np.float32))
    logprobs = alone.programs.score(tiny_params(), *alone.place([host]))
    (completed,), _ = alone.complete(tiny_params(), [host])
    expected = np.where(missing, to_host(logprobs), host.old_logprobs)
    np.testing.assert_array_equal(to_host(completed.old_logprobs), np.where(host.loss_mask, expected, 0))
    # Nothing else but advantages is touched.
    for name in set(TrainBatch._fields) - {"old_logprobs", "advantages"}:
        np.testing.assert_array_equal(to_host(getattr(completed, name)), getattr(host, name))


# --- each term of the loss, by hand ---


@functools.cache
def make_unigram(method="reinforce", **terms):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, batch = TrainState(*[here] * 3), TrainBatch(*[here] * 10)
    loss = LossSettings(method, {"clip_low": None}, temperature=1.0, logprob_chunk=4, **terms)
    return make_programs(Unigram(), make_optimizer(OPTIMIZER, None), loss, Shardings(state, batch, here))


def unigram_batches(*responses, weight=1.0, supervised=0.0):
    """A microbatch per response [(tokens, advantage)]; log-probabilities are 0."""
    return [
        pack([Example(np.array([0]), np.array(tokens), 0.0, 0.0, advantage, weight, supervised)], rows=1, tokens_per_row=8)[0]
        for tokens, advantage in responses
    ]


def unigram_gradient(batches, method="reinforce", probabilities=(0.25, 0.25, 0.25, 0.25), **terms):
    programs = make_unigram(method, **terms)
    params = {"logits": jnp.log(jnp.array(probabilities))}
    carry = programs.zero(params)
    for batch in batches:
        *carry, _ = programs.accumulate(params, tuple(carry), batch)
    return np.asarray(carry[0]["logits"]), to_host(carry[1])


def test_every_token_of_all_microbatches_weighs_what_it_carries():
    # One microbatch has the token 1, the other five times the token 2; A = 1. Softmax is 1/4 for each of 4 tokens.
    # Sum over 6 tokens of -(onehot - 1/4): [6/4, 6/4 - 1, 6/4 - 5, 6/4], over 6. A mean of the microbatches' means
    # would give [1/4, -1/4, -1/4, 1/4].
    gradient, totals = unigram_gradient(unigram_batches(([1], 1.0), ([2] * 5, 1.0), weight=1 / 6))
    np.testing.assert_allclose(gradient, [1 / 4, 1 / 12, -7 / 12, 1 / 4], rtol=1e-6)
    # The mean loss is the mean of -log(1/4), the entropy log 4 at every token.
    np.testing.assert_allclose(totals.sums["loss"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(totals.sums["entropy"], 6 * np.log(4), rtol=1e-6)
    # Weights 1/2 and 1/10 make of it the mean of the responses' means.
    batches = [*unigram_batches(([1], 1.0), weight=1 / 2), *unigram_batches(([2] * 5, 1.0), weight=1 / 10)]
    gradient, totals = unigram_gradient(batches)
    np.testing.assert_allclose(gradient, [1 / 4, -1 / 4, -1 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(totals.sums["loss"], np.log(4), rtol=1e-6)


def test_tokens_that_are_not_computed_would_have_added_nothing():
    # What they count for is in the weights of the others: 1/4 for 1 token computed of 4.
    computed = unigram_batches(([1], 1.0), weight=1 / 4)
    with_zeros, _ = unigram_gradient(computed + unigram_batches(([3, 3, 3], 0.0), weight=1 / 4))
    without, _ = unigram_gradient(computed)
    np.testing.assert_allclose(without, [1 / 16, -3 / 16, 1 / 16, 1 / 16], rtol=1e-6)
    np.testing.assert_array_equal(with_zeros, without)


@pytest.mark.parametrize("advantage, policy_weight, expected", [
    (0.0, 0.5, [1 / 8, -3 / 8, 1 / 8, 1 / 8]),  # -0.5 (onehot - 1/4): the supervised term alone
    (-1.0, 0.0, [1 / 8, -3 / 8, 1 / 8, 1 / 8]),  # a weight of 0 leaves the policy term out, not this one
    (-1.0, 0.5, [0, 0, 0, 0]),  # both pull alike, in opposite directions
])  # fmt: skip
def test_the_supervised_term_needs_no_advantage(advantage, policy_weight, expected):
    gradient, totals = unigram_gradient(unigram_batches(([1], advantage), weight=policy_weight, supervised=0.5))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(totals.sums["supervised"], 0.5 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(totals.sums["loss"], policy_weight * advantage * np.log(4), rtol=1e-6)  # reported apart


def test_the_supervised_term_knows_no_clipping():
    # Ratio 1/4: DGPO makes this token's weight small as A < 0, and GRPO 0; the supervised pull stays whole.
    for method in ("grpo", "dgpo", "sapo"):
        both, _ = unigram_gradient(unigram_batches(([1], -1.0), supervised=0.5), method)
        policy, _ = unigram_gradient(unigram_batches(([1], -1.0)), method)
        np.testing.assert_allclose(both - policy, [1 / 8, -3 / 8, 1 / 8, 1 / 8], rtol=1e-5)


@pytest.mark.parametrize("estimator, kl, pull", [
    ("k2", np.log(2) ** 2 / 2, -np.log(2)),  # d = log 2: d^2 / 2, by log pi -d
    ("k3", 1 - np.log(2), -1.0),  # exp(d) - d - 1, by log pi 1 - exp(d)
])  # fmt: skip
def test_the_distance_to_the_reference_is_a_term_of_its_own(estimator, kl, pull):
    (batch,) = unigram_batches(([1, 1], 0.0), weight=1 / 2)
    batch = batch._replace(ref_logprobs=np.where(batch.loss_mask, np.log(2 / 4), np.nan).astype(np.float32))
    gradient, totals = unigram_gradient([batch], kl=0.5, kl_estimator=estimator)
    np.testing.assert_allclose(gradient, 0.5 * pull * (np.array([0, 1, 0, 0]) - 1 / 4), rtol=1e-5)
    # Reported as it is, without coefficient and weights, and in no other figure.
    np.testing.assert_allclose(totals.sums["kl_ref"], 2 * kl, rtol=1e-5)
    assert totals.sums["loss"] == 0


def test_a_reference_is_not_looked_at_where_the_distance_is_off():
    (batch,) = unigram_batches(([1], 1.0))
    expected, _ = unigram_gradient([batch])
    gradient, totals = unigram_gradient([batch._replace(ref_logprobs=np.full_like(batch.ref_logprobs, np.nan))])
    np.testing.assert_array_equal(gradient, expected)
    assert totals.sums["kl_ref"] == 0


def test_the_entropy_bonus_flattens_what_the_tokens_were_drawn_from():
    # p = [1/2, 1/4, 1/8, 1/8]: H = 7/4 log 2, by logit v -p_v (log p_v + H) = -p_v (7/4 - k) log 2 with k = 1, 2, 3, 3.
    probabilities = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    slope = -probabilities * (7 / 4 - np.array([1, 2, 3, 3])) * np.log(2)
    batches = unigram_batches(([0, 3], 0.0), weight=1 / 2)
    gradient, totals = unigram_gradient(batches, entropy=0.5, probabilities=probabilities)
    np.testing.assert_allclose(gradient, -0.5 * slope, rtol=1e-5)  # downhill raises the entropy
    np.testing.assert_allclose(totals.sums["entropy"], 2 * 7 / 4 * np.log(2), rtol=1e-6)
    watched, totals = unigram_gradient(batches, probabilities=probabilities)
    assert not watched.any()
    np.testing.assert_allclose(totals.sums["entropy"], 2 * 7 / 4 * np.log(2), rtol=1e-6)


# --- what is done about the sampler's log-probabilities ---


def test_complete_corrects_advantages_and_says_how_far_the_sampler_was_off():
    # pi_old is 1/4; pi_old / pi_sampler by token: 1 as it is, 1.5 as it is, 2.5 cut off at 2, 4 left out as above 3.
    (batch,) = unigram_batches(([1, 2, 3, 0], -2.0), weight=1 / 4)
    ratio, slots = np.array([1, 1.5, 2.5, 4.0]), batch.loss_mask[0]
    sampler = batch.sampler_logprobs.copy()
    sampler[0, slots] = np.log(1 / 4 / ratio)
    batch = unscored(batch)._replace(sampler_logprobs=sampler)
    correction = Correction("token", cap=2.0, reject="token", low=0.5, high=3.0)
    completed, gap = to_host(make_unigram(correction=correction).complete(batch, np.full((1, 8), np.log(1 / 4), np.float32)))
    np.testing.assert_allclose(completed.old_logprobs[0], np.where(slots, np.log(1 / 4), 0), rtol=1e-6)
    np.testing.assert_allclose(completed.advantages[0, slots], [-2, -3, -4, 0], rtol=1e-6)
    assert not completed.advantages[0, ~slots].any()
    # A token left out still counts in what the loss is divided by: weights stay.
    np.testing.assert_array_equal(completed.weights, batch.weights)
    expected = {"tokens": 4, "gap": np.log(ratio).sum(), "weight": 1 + 1.5 + 2, "rejected": 1}
    assert {name: float(value) for name, value in gap.sums.items()} == pytest.approx(expected, rel=1e-6)
    assert {name: float(value) for name, value in gap.maxima.items()} == pytest.approx({"gap": np.log(4), "weight": 2}, rel=1e-6)


def test_without_a_correction_the_gap_is_measured_and_nothing_done():
    (batch,) = unigram_batches(([1, 2], -2.0))
    sampler = np.where(batch.loss_mask, np.float32(-3), 0)
    completed, gap = to_host(make_unigram().complete(unscored(batch)._replace(sampler_logprobs=sampler), np.full((1, 8), -1, np.float32)))
    np.testing.assert_array_equal(completed.advantages, batch.advantages)
    assert gap.sums == {"tokens": 2, "gap": 4, "weight": 2, "rejected": 0}
    assert gap.maxima == {"gap": 2, "weight": 1}


# --- figures ---


def test_a_method_without_a_region_reports_none_left():
    # `reinforce` has no clip: a negative token at ratio 1/4 is not below anything.
    _, totals = unigram_gradient(unigram_batches(([1], -1.0), ([2], 1.0)))
    assert totals.sums["too_low"] == totals.sums["too_high"] == 0


def test_settings_left_open_clip_and_report_at_the_published_bounds():
    # Ratio 1/4 over e^log(1/4 / 0.9) = 0.9: inside [0.8, 1.28], so not reported as below.
    (batch,) = unigram_batches(([1, 1], -1.0))
    old_logprobs = np.where(batch.loss_mask, np.log(1 / 4 / 0.9), 0).astype(np.float32)
    _, totals = unigram_gradient([batch._replace(old_logprobs=old_logprobs)], "dgpo")
    np.testing.assert_allclose(totals.sums["ratio"], 1.8, rtol=1e-6)
    assert totals.sums["too_low"] == totals.sums["clipped"] == 0
    np.testing.assert_allclose(totals.maxima["ratio_error"], 0.1, rtol=1e-5)


def test_totals_of_two_parts_are_those_of_the_whole():
    parts = unigram_batches(([1], 1.0), ([2, 2], -1.0))
    separate = merge_totals(*(unigram_gradient([part])[1] for part in parts))
    together = unigram_gradient(parts)[1]
    assert_trees_close(to_host(separate), together)


def with_ratios(batch, ratios):
    """The batch with old log-probabilities that give its tokens, of probability 1/4, these ratios."""
    old_logprobs = np.zeros_like(batch.old_logprobs)
    old_logprobs[batch.loss_mask] = np.log(1 / 4 / np.array(ratios))
    return batch._replace(old_logprobs=old_logprobs)


def test_figures_of_ratios_by_hand():
    # Region [0.8, 1.28]; the first batch is good (A > 0), the second bad.
    good, bad = unigram_batches(([1, 1, 1], 1.0), ([1, 1, 1, 1], -1.0), weight=0.1)
    batches = [with_ratios(good, [0.5, 1.0, 2.0]), with_ratios(bad, [0.05, 0.9, 5.0, 20.0])]
    _, totals = unigram_gradient(batches, "grpo")
    sums, maxima = totals.sums, totals.maxima
    assert {name: float(sums[name]) for name in Regions._fields} == {
        "too_high": 1,  # 2.0 and A > 0
        "low_reverse": 1,  # 0.5 and A > 0
        "too_low": 1,  # 0.05 and A < 0
        "high_reverse": 2,  # 5.0 and 20.0 and A < 0
    }
    assert sums["clipped"] == 2 and sums["dual_clipped"] == 0
    ratios = np.array([0.5, 1.0, 2.0, 0.05, 0.9, 5.0, 20.0])
    np.testing.assert_allclose(sums["ratio"], ratios.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["kl_old"], -np.log(ratios).sum(), rtol=1e-5)
    # Weights: the clipped ones 0, those a step brings back their ratio.
    weights = {name: (float(sums[f"{name}_weight"]), float(maxima[f"{name}_weight"])) for name in Regions._fields}
    assert weights["too_high"] == weights["too_low"] == (0, 0)
    assert weights["low_reverse"] == pytest.approx((0.5, 0.5)) and weights["high_reverse"] == pytest.approx((25, 20))
    assert [float(maxima[name]) for name in ("ratio", "minus_ratio", "ratio_error")] == pytest.approx([20, -0.05, 19], rel=1e-5)
    # Edges 0.1, 0.25, 0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.28, 2, 4, 10; a ratio on an edge may fall to either side.
    histogram = sums["histogram"]
    assert histogram.shape == (len(HISTOGRAM_EDGES) + 1,) and histogram.sum() == 7
    assert histogram[0] == histogram[6] == histogram[11] == histogram[12] == 1  # 0.05, 1, 5, 20
    assert histogram[2:4].sum() == histogram[4:6].sum() == histogram[9:11].sum() == 1  # 0.5, 0.9, 2


def test_totals_have_the_names_that_the_metrics_ask_for():
    _, totals = unigram_gradient(unigram_batches(([1], 1.0)))
    assert set(totals.sums) == set(LOSS_SUMS) and set(totals.maxima) == set(LOSS_MAXIMA)


# --- updates that must not happen, or must not harm ---


@pytest.mark.parametrize("masked_batches", [0, 2])
def test_nothing_to_learn_from_is_a_zero_gradient_and_a_finite_state(alone, masked_batches):
    state, totals, figures = alone.update(alone.state(), [empty_batch(8, 20)] * masked_batches)
    assert (float(figures.grad_norm), float(figures.skipped), int(state.update)) == (0.0, 0.0, 1)
    assert {name: float(np.sum(total)) for name, total in totals.sums.items()} == dict.fromkeys(LOSS_SUMS, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_host(state)))
    # Only weight decay acts: 0.1 times the rate, on matrices and not on the norms' scales.
    before, after = to_host(tiny_params()), to_host(state.params)
    np.testing.assert_allclose(after["embed"]["table"], before["embed"]["table"] * (1 - RATE * 0.1), rtol=1e-5)
    np.testing.assert_array_equal(after["final_norm"]["scale"], before["final_norm"]["scale"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(trainer, bad):
    batches = pack_all(EXAMPLES)
    state, _, _ = trainer.update(trainer.state(), batches)  # so that the moments are not all 0
    before = to_host(state)
    poisoned = [batch._replace(advantages=np.where(batch.loss_mask, bad, 0).astype(np.float32)) for batch in batches]
    state, _, figures = trainer.update(state, poisoned)
    assert float(figures.skipped) == 1.0
    assert not np.isfinite(float(figures.grad_norm))
    assert_trees_equal(state, before)
    state, _, figures = trainer.update(state, batches)  # and the next one goes on from there
    assert (float(figures.skipped), int(state.update)) == (0.0, 2)


def suspects_of(layout, marks):
    """{index of the example: what was not finite}."""
    return {suspect.index: suspect.not_finite for suspect in find_suspects(EXAMPLES, layout, to_host(marks))}


def marked_update(trainer, state, layout, changed=(), **more):
    """An update on EXAMPLES, but for the advantages of some: {index: advantage}."""
    examples = [example._replace(advantage=dict(changed).get(at, example.advantage)) for at, example in enumerate(EXAMPLES)]
    batches = [batch._replace(ref_logprobs=batch.sampler_logprobs) for batch in fill(examples, layout)]
    return take_marked_update(trainer.programs, state, trainer.place(batches), trainer.scalar(RATE), **more)


LAYOUT = lay_out(EXAMPLES, Shape(8, 20))


def test_broken_weights_mark_every_token_and_stay_as_they_are(trainer):
    state = trainer.state()
    table = state.params["embed"]["table"]
    broken = to_host(table).copy()
    broken[17, 3] = np.inf  # it is the output matrix too, so every token's logits have it
    params = dict(state.params, embed=dict(state.params["embed"], table=to_device(broken, table.sharding)))
    state = state._replace(params=params)
    before = to_host(state)
    state, totals, figures, marks = marked_update(trainer, state, LAYOUT)
    assert (float(figures.skipped), int(state.update)) == (1.0, 0)
    assert_trees_equal(state, before)
    assert to_host(totals).sums["not_finite"] == TOKENS
    assert suspects_of(LAYOUT, marks) == {at: ["log-probability", "loss"] for at in range(10)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_advantage_that_is_not_finite_names_its_sequence_alone(trainer, bad):
    state = trainer.state()
    before = to_host(state)
    state, _, figures, marks = marked_update(trainer, state, LAYOUT, {4: bad})
    assert float(figures.skipped) == 1
    assert_trees_equal(state, before)
    assert suspects_of(LAYOUT, marks) == {4: ["loss"]}
    # The next update is what it would have been.
    state, _, figures, marks = marked_update(trainer, state, LAYOUT)
    undisturbed, _, _, _ = marked_update(trainer, trainer.state(), LAYOUT)
    assert float(figures.skipped) == 0 and not any(mark.tokens.any() for mark in to_host(marks))
    assert_trees_equal(state, undisturbed)


# Five sequences in each of two microbatches.
PARTS = [lay_out(half, Shape(8, 20)) for half in (EXAMPLES[:5], EXAMPLES[5:])]
HALVES = LAYOUT._replace(places=[place._replace(batch=number) for number, part in enumerate(PARTS) for place in part.places], batches=2)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_gradient_that_overflows_alone_names_the_whole_microbatch(trainer, culprit):
    loud = {at: EXAMPLES[at].advantage * 1e25 for at in (range(5), range(5, 10))[culprit]}
    state = trainer.state()
    before = to_host(state)
    state, totals, figures, marks = marked_update(trainer, state, HALVES, loud)
    # Every number is finite, only the squares in the norm are not.
    assert float(figures.skipped) == 1 and np.isinf(float(figures.grad_norm))
    assert to_host(totals).sums["not_finite"] == 0 and np.isfinite(to_host(totals).sums["objective"])
    assert_trees_equal(state, before)
    # Of the microbatch behind it the sum says nothing.
    assert suspects_of(HALVES, marks) == {at: ["gradient of the microbatch"] for at in loud}


def test_an_update_that_is_broken_off_between_two_microbatches_leaves_the_state_as_it_was(trainer):
    state, asked = trainer.state(), []
    before = to_host(state)

    def between():
        asked.append(len(asked))
        if len(asked) == 2:
            raise Stop

    with pytest.raises(Stop):
        marked_update(trainer, state, HALVES, between=between)
    assert_trees_equal(state, before)
    state, _, _, _ = marked_update(trainer, state, HALVES, between=lambda: asked.append("again"))
    undisturbed, _, _, _ = marked_update(trainer, trainer.state(), HALVES)
    assert_trees_equal(state, undisturbed)
    assert asked == [0, 1, "again", "again"]


def skip_of_unigram(tokens, advantage, probabilities):
    """(Totals, StepFigures, Suspects) of one update of GRPO by one response, whose sampler gave each token probability 1."""
    example = Example(np.array([0]), np.array(tokens), 0.0, 0.0, advantage, 1.0)
    layout = lay_out([example], Shape(1, 8))
    params = {"logits": jnp.log(jnp.array(probabilities))}
    state = TrainState(jnp.int32(0), params, make_optimizer(OPTIMIZER, None).init(params))
    _, totals, figures, marks = take_marked_update(make_unigram("grpo"), state, fill([example], layout), jnp.float32(RATE))
    return to_host(totals), to_host(figures), find_suspects([example], layout, to_host(marks))


def test_a_log_probability_of_minus_infinity_is_not_hidden_by_clipping():
    # Ratio 0, A < 0: the rule alone would give the token the bound as its value, and no gradient.
    totals, figures, (suspect,) = skip_of_unigram([1, 0], -1.0, (0.0, 0.25, 0.25, 0.5))
    assert figures.skipped == 1 and totals.sums["not_finite"] == 1
    assert "log-probability" in suspect.not_finite and suspect.tokens.tolist() == [1]


@pytest.mark.parametrize("changes, skipped", [
    ({}, 0),
    ({"not_finite": 1.0}, 1),  # a token is enough, whatever loss and gradient came out
    ({"objective": np.inf}, 1),
    ({"objective": np.nan}, 1),
    ({"entropy": np.nan, "loss": np.nan, "ratio": np.inf}, 0),  # figures to look at do not decide
])  # fmt: skip
def test_a_step_is_taken_only_if_all_that_it_is_made_of_is_finite(changes, skipped):
    programs, params = make_unigram(), {"logits": jnp.zeros(4)}
    _, totals = programs.zero(params)
    totals = totals._replace(sums=totals.sums | {name: jnp.float32(value) for name, value in changes.items()})
    state = TrainState(jnp.int32(0), params, make_optimizer(OPTIMIZER, None).init(params))
    state, figures = programs.apply(state, {"logits": jnp.ones(4)}, totals, jnp.float32(RATE))
    assert (figures.skipped, int(state.update), bool(jnp.any(state.params["logits"] != 0))) == (skipped, 1 - skipped, not skipped)


def test_a_loss_that_overflows_only_as_a_sum_skips_the_update():
    # Ratio 1/4, clipped: no gradient; each token's loss is 0.8 * 2e38, two of them are still finite, three are not.
    totals, figures, _ = skip_of_unigram([1, 2], -2e38, (0.25,) * 4)
    assert (figures.skipped, figures.grad_norm, totals.sums["not_finite"]) == (0, 0, 0)
    totals, figures, (suspect,) = skip_of_unigram([1, 2, 3], -2e38, (0.25,) * 4)
    assert (figures.skipped, figures.grad_norm, totals.sums["not_finite"]) == (1, 0, 0)
    assert suspect.not_finite == ["sum of the loss"]


def test_padding_may_hold_anything(alone, whole):
    (batch,) = pack_all(EXAMPLES)

    def spoilt(array):
        return np.where(batch.loss_mask, array, np.nan).astype(np.float32)

    names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "advantages")  # weights are 0 there
    garbage = batch._replace(**{name: spoilt(getattr(batch, name)) for name in names})
    gradient, totals = alone.gradient([garbage])
    assert_trees_equal(gradient, whole[0])
    assert_trees_equal(totals, whole[1])


def test_the_old_state_and_the_gradient_sum_give_their_memory_to_the_new(alone):
    params = tiny_params()
    (batch,) = alone.place(pack_all(EXAMPLES))
    zero = alone.programs.zero(params)
    gradients, totals, _ = alone.programs.accumulate(params, zero, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(zero[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    state = alone.state()
    alone.programs.apply(state, gradients, totals, alone.scalar(RATE))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_clipping_bounds_the_step_but_not_the_reported_norm(alone):
    batches = pack_all(EXAMPLES)
    (loud,) = [batch._replace(advantages=batch.advantages * 1e4) for batch in batches]
    state, _, figures = alone.update(alone.state(), [loud])
    first_moment = state.opt_state[1].mu  # (1 - beta1) times the clipped gradient
    assert float(figures.grad_norm) > 10
    np.testing.assert_allclose(norm(first_moment) / 0.1, OPTIMIZER.clip_norm, rtol=1e-4)


def test_rows_are_split_over_the_replicas_and_scalars_are_everywhere(trainer):
    assert trainer.shardings.batch.tokens.is_equivalent_to(rows_sharding(trainer.model, "tokens"), 2)
    _, totals = trainer.programs.zero(tiny_params(trainer.mesh_name))
    assert totals.sums["tokens"].sharding.is_fully_replicated
