"""The programs of an update: one gradient however the batch is cut and wherever it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, MESHES, rows_sharding, tiny_model, tiny_params

from dgpo_jax.build import build_shardings
from dgpo_jax.config import OptimizerConfig
from dgpo_jax.models.parameters import decays
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.packing import Example, empty_batch, pack
from dgpo_jax.rl.update import LOSS_SUMS, LossSettings, Shardings, make_programs, merge_totals, take_update
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.types import TrainBatch, TrainState

DGPO = LossSettings("dgpo", {"clip_low": 0.2, "clip_high": 0.28}, temperature=0.8, logprob_chunk=8)
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
        self.programs = make_programs(self.model, self.optimizer, DGPO, self.shardings)

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

    def gradient(self, batches, normaliser):
        """(gradients, Totals) of the weights of tiny_params, on the host."""
        params = tiny_params(self.mesh_name)
        carry = self.programs.zero(params)
        for batch in self.place(batches):
            carry = self.programs.accumulate(params, carry, batch, self.scalar(normaliser))
        return to_host(carry)

    def update(self, state, batches, normaliser, rate=RATE):
        return take_update(self.programs, state, self.place(batches), self.scalar(normaliser), self.scalar(rate))


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
    """Sequences of uneven length whose old log-probabilities put ratios on both sides of the region."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        response = rng.integers(1, 64, 1 + index).astype(np.int32)
        prompt = rng.integers(1, 64, 1 + index % 4).astype(np.int32)
        logprobs = rng.uniform(-6, -2, len(response)).astype(np.float32)
        examples.append(Example(prompt, response, logprobs, float(rng.normal())))
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


def pack_all(examples):
    """Microbatches of 8 rows of 20 slots: one shape in all tests of the tiny model, so that nothing compiles again."""
    return pack(examples, rows=8, tokens_per_row=20)


@functools.cache
def gradient_of_the_whole():
    """Gradient and figures of all examples in one microbatch on one device."""
    (batch,) = pack_all(EXAMPLES)
    assert batch.segment.max() >= 2  # sequences do share rows
    return make_trainer("one device").gradient([batch], TOKENS)


@pytest.fixture
def whole():
    return gradient_of_the_whole()


def test_the_examples_reach_every_branch_of_the_loss(whole):
    # Otherwise the tests below would say little.
    assert whole[1].sums["tokens"] == TOKENS
    assert whole[1].sums["too_low"] > 0 and whole[1].sums["too_high"] > 0
    assert norm(whole[0]) > 0.1


CUTS = {
    "two microbatches": [*pack_all(EXAMPLES[:7]), *pack_all(EXAMPLES[7:])],
    "a microbatch each": [batch for example in EXAMPLES for batch in pack_all([example])],
    "in another order": pack_all(EXAMPLES[::-1]),
    "a row each": [
        jax.tree.map(
            lambda *rows: np.concatenate(rows),
            *[pack([example], rows=1, tokens_per_row=20)[0] for example in part],
            empty_batch(8 - len(part), 20),
        )
        for part in (EXAMPLES[:7], EXAMPLES[7:])
    ],
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(trainer, whole, cut):
    gradient, totals = trainer.gradient(CUTS[cut], TOKENS)
    assert_trees_close(gradient, whole[0])
    assert_trees_close(totals, whole[1])


@functools.cache
def two_updates(mesh_name):
    """The state after them, on the host."""
    trainer = make_trainer(mesh_name)
    state = trainer.state()
    for minibatch in (CUTS["two microbatches"], CUTS["two microbatches"][1:]):
        for batch in trainer.place(minibatch):
            trainer.programs.score(state.params, batch)
        state, _, figures = trainer.update(state, minibatch, TOKENS)
        assert float(figures.skipped) == 0
    return to_host(state)


def test_two_updates_compile_each_program_once_and_end_at_the_same_weights_on_every_mesh(trainer):
    ours, expected = two_updates(trainer.mesh_name), two_updates("one device")
    counts = {name: program._cache_size() for name, program in trainer.programs._asdict().items()}
    assert counts == {"score": 1, "zero": 1, "accumulate": 1, "apply": 1}
    assert ours.update == expected.update == 2
    # Where a gradient is nothing but rounding, Adam still steps by its sign: such weights may end some steps apart.
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(expected.params), strict=True):
        assert np.mean(np.abs(one - other) < 1e-5) > 0.99
        assert np.abs(one - other).max() <= 4 * RATE


def test_the_first_ratio_after_score_is_one_to_rounding(trainer):
    params = tiny_params(trainer.mesh_name)
    (batch,) = trainer.place(pack_all(EXAMPLES))
    logprobs, gap = trainer.programs.score(params, batch)
    carry = trainer.programs.accumulate(
        params, trainer.programs.zero(params), batch._replace(old_logprobs=logprobs), trainer.scalar(TOKENS)
    )
    totals = to_host(carry[1])
    assert totals.maxima["ratio_error"] < 1e-6
    assert totals.sums["too_low"] == totals.sums["too_high"] == 0
    np.testing.assert_allclose(totals.sums["ratio"], TOKENS, rtol=1e-6)
    mask = np.asarray(batch.loss_mask)
    gaps = np.abs(np.asarray(logprobs) - np.asarray(batch.old_logprobs))[mask]
    np.testing.assert_allclose([gap.sums["gap"], gap.maxima["gap"]], [gaps.sum(), gaps.max()], rtol=1e-5)
    assert gap.sums["tokens"] == TOKENS


# --- the normaliser, by hand ---


class Unigram:
    """Logits that are the parameters, whatever came before: the gradient of a log-probability is onehot - softmax."""

    def hidden(self, params, tokens, segment, position):
        return jnp.ones((*tokens.shape, 1), jnp.float32), None

    def unembedding(self, params):
        return params["logits"][None]


@functools.cache
def make_unigram(method):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, batch = TrainState(*[here] * 3), TrainBatch(*[here] * 6)
    loss = LossSettings(method, {"clip_low": None}, temperature=1.0, logprob_chunk=4)
    return make_programs(Unigram(), make_optimizer(OPTIMIZER, None), loss, Shardings(state, batch, here))


def unigram_batches(*responses):
    """A microbatch per response [(tokens, advantage)]."""
    return [
        pack([Example(np.array([0]), np.array(tokens), np.zeros(len(tokens), np.float32), advantage)],
             rows=1, tokens_per_row=8)[0]
        for tokens, advantage in responses
    ]  # fmt: skip


def unigram_gradient(batches, normaliser, method="reinforce"):
    programs = make_unigram(method)
    params = {"logits": jnp.zeros(4)}
    carry = programs.zero(params)
    for batch in batches:
        carry = programs.accumulate(params, carry, batch, np.float32(normaliser))
    return np.asarray(carry[0]["logits"]), to_host(carry[1])


def test_every_token_of_all_microbatches_weighs_the_same():
    # One microbatch has the token 1, the other five times the token 2; A = 1. Softmax is 1/4 for each of 4 tokens.
    # Sum over 6 tokens of -(onehot - 1/4): [6/4, 6/4 - 1, 6/4 - 5, 6/4], over 6. A mean of the microbatches' means
    # would give [1/4, -1/4, -1/4, 1/4].
    gradient, totals = unigram_gradient(unigram_batches(([1], 1.0), ([2] * 5, 1.0)), 6)
    np.testing.assert_allclose(gradient, [1 / 4, 1 / 12, -7 / 12, 1 / 4], rtol=1e-6)
    # The mean loss is the mean of -log(1/4), the entropy log 4 at every token.
    np.testing.assert_allclose(totals.sums["loss"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(totals.sums["entropy"], 6 * np.log(4), rtol=1e-6)


def test_tokens_that_are_not_computed_count_in_the_normaliser():
    computed = unigram_batches(([1], 1.0))
    with_zeros, _ = unigram_gradient(computed + unigram_batches(([3, 3, 3], 0.0)), 4)
    without, _ = unigram_gradient(computed, 4)
    np.testing.assert_allclose(without, [1 / 16, -3 / 16, 1 / 16, 1 / 16], rtol=1e-6)
    np.testing.assert_array_equal(with_zeros, without)


def test_a_method_without_a_region_reports_none_left():
    # `reinforce` has no clip: a negative token at ratio 1/4 is not below anything.
    _, totals = unigram_gradient(unigram_batches(([1], -1.0), ([2], 1.0)), 2)
    assert totals.sums["too_low"] == totals.sums["too_high"] == 0


def test_settings_left_open_clip_and_report_at_the_published_bounds():
    # Ratio 1/4 over e^log(1/4 / 0.9) = 0.9: inside [0.8, 1.28], so not reported as below.
    (batch,) = unigram_batches(([1, 1], -1.0))
    old_logprobs = np.where(batch.loss_mask, np.log(1 / 4 / 0.9), 0).astype(np.float32)
    _, totals = unigram_gradient([batch._replace(old_logprobs=old_logprobs)], 2, "dgpo")
    np.testing.assert_allclose(totals.sums["ratio"], 1.8, rtol=1e-6)
    assert totals.sums["too_low"] == 0
    np.testing.assert_allclose(totals.maxima["ratio_error"], 0.1, rtol=1e-5)


def test_totals_of_two_parts_are_those_of_the_whole():
    parts = unigram_batches(([1], 1.0), ([2, 2], -1.0))
    separate = merge_totals(*(unigram_gradient([part], 3)[1] for part in parts))
    together = unigram_gradient(parts, 3)[1]
    assert_trees_close(to_host(separate), together)


# --- updates that must not happen, or must not harm ---


@pytest.mark.parametrize("normaliser", [0, 5])  # 5: the response tokens were all left out as without advantage
@pytest.mark.parametrize("masked_batches", [0, 2])
def test_nothing_to_learn_from_is_a_zero_gradient_and_a_finite_state(alone, masked_batches, normaliser):
    state, totals, figures = alone.update(alone.state(), [empty_batch(8, 20)] * masked_batches, normaliser)
    assert (float(figures.grad_norm), float(figures.skipped), int(state.update)) == (0.0, 0.0, 1)
    assert {name: float(total) for name, total in totals.sums.items()} == dict.fromkeys(LOSS_SUMS, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_host(state)))
    # Only weight decay acts: 0.1 times the rate, on matrices and not on the norms' scales.
    before, after = to_host(tiny_params()), to_host(state.params)
    np.testing.assert_allclose(after["embed"]["table"], before["embed"]["table"] * (1 - RATE * 0.1), rtol=1e-5)
    np.testing.assert_array_equal(after["final_norm"]["scale"], before["final_norm"]["scale"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(trainer, bad):
    batches = pack_all(EXAMPLES)
    state, _, _ = trainer.update(trainer.state(), batches, TOKENS)  # so that the moments are not all 0
    before = to_host(state)
    poisoned = [batch._replace(advantages=np.where(batch.loss_mask, bad, 0).astype(np.float32)) for batch in batches]
    state, _, figures = trainer.update(state, poisoned, TOKENS)
    assert float(figures.skipped) == 1.0
    assert not np.isfinite(float(figures.grad_norm))
    assert_trees_equal(state, before)
    state, _, figures = trainer.update(state, batches, TOKENS)  # and the next one goes on from there
    assert (float(figures.skipped), int(state.update)) == (0.0, 2)


def test_padding_may_hold_anything(alone, whole):
    (batch,) = pack_all(EXAMPLES)
    garbage = batch._replace(
        old_logprobs=np.where(batch.loss_mask, batch.old_logprobs, np.nan).astype(np.float32),
        advantages=np.where(batch.loss_mask, batch.advantages, np.nan).astype(np.float32),
    )
    gradient, totals = alone.gradient([garbage], TOKENS)
    assert_trees_equal(gradient, whole[0])
    assert_trees_equal(totals, whole[1])


def test_the_old_state_and_the_gradient_sum_give_their_memory_to_the_new(alone):
    params = tiny_params()
    (batch,) = alone.place(pack_all(EXAMPLES))
    zero = alone.programs.zero(params)
    gradients, _ = alone.programs.accumulate(params, zero, batch, alone.scalar(TOKENS))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(zero[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    state = alone.state()
    alone.programs.apply(state, gradients, alone.scalar(RATE))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_clipping_bounds_the_step_but_not_the_reported_norm(alone):
    batches = pack_all(EXAMPLES)
    (loud,) = [batch._replace(advantages=batch.advantages * 1e4) for batch in batches]
    state, _, figures = alone.update(alone.state(), [loud], TOKENS)
    first_moment = state.opt_state[1].mu  # (1 - beta1) times the clipped gradient
    assert float(figures.grad_norm) > 10
    np.testing.assert_allclose(norm(first_moment) / 0.1, OPTIMIZER.clip_norm, rtol=1e-4)


def test_rows_are_split_over_the_replicas_and_scalars_are_everywhere(trainer):
    assert trainer.shardings.batch.tokens.is_equivalent_to(rows_sharding(trainer.model, "tokens"), 2)
    _, totals = trainer.programs.zero(tiny_params(trainer.mesh_name))
    assert totals.sums["tokens"].sharding.is_fully_replicated
