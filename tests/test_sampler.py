"""The sampler: with a table of next-token logits for a model, where every outcome is known, and with a real one."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from tiny import MESHES, random_prompts, tiny_model, tiny_params

from dgpo_jax.ahead import compile_program
from dgpo_jax.build import make_decode_params
from dgpo_jax.models.parameters import parameter_shardings
from dgpo_jax.rl import sampler as module
from dgpo_jax.rl.drawing import CDF_BLOCK, Draw, Sampling, draw_tokens, inverse_cdf, restrict
from dgpo_jax.rl.logprobs import token_logprobs
from dgpo_jax.rl.packing import pack, to_examples
from dgpo_jax.rl.sampler import make_sampler
from dgpo_jax.sharding import DECODE_RULES
from dgpo_jax.types import Experience, KVCache, Prompts

STOP, PAD = 9, 0


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


class TableModel:
    """The logits of the next token depend on the last token only: row `token` of params f32[V, V]."""

    mesh = None

    def make_cache(self, rows, slots, int8=False):
        empty = jnp.zeros((1, rows, 1, slots, 1), jnp.int32)
        return KVCache(empty, empty)

    def prefill(self, params, tokens, length):
        tokens = tokens[None, :, None, :, None]
        return KVCache(tokens, -tokens)

    def decode(self, params, token, position, cache):
        rows, cache = jnp.arange(len(token)), KVCache(*cache)
        cache = KVCache(cache.key.at[0, rows, 0, position, 0].set(token), cache.value.at[0, rows, 0, position, 0].set(-token))
        return self.look(params, token, position, cache), cache

    def look(self, params, token, position, cache):
        return jax.nn.one_hot(token, params.shape[0], dtype=jnp.float32)

    def unembedding(self, params):
        return params


class SumModel(TableModel):
    """They depend on the sum of all tokens so far, as the cache has them: a slot mixed up shows in what follows."""

    def look(self, params, token, position, cache):
        rows = len(token)
        seen = jnp.arange(cache.key.shape[3])[None, :] <= position[:, None]
        total = jnp.sum(jnp.where(seen, cache.key[0, :rows, 0, :, 0] - cache.value[0, :rows, 0, :, 0], 0), axis=1)
        return jax.nn.one_hot(total // 2 % params.shape[0], params.shape[0], dtype=jnp.float32)


def count_up(size=12):
    """A table that says t + 1 after t with all but 3e-9 of the probability, and 0 after the last."""
    return 20 * np.roll(np.eye(size, dtype=np.float32), 1, axis=1)


def left_padded(prompts, slots=None):
    slots = slots or max(map(len, prompts))
    tokens, mask = np.zeros((len(prompts), slots), np.int32), np.zeros((len(prompts), slots), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, slots - len(prompt) :] = prompt
        mask[row, slots - len(prompt) :] = True
    return Prompts(tokens, mask)


def make_draw(seed=0, stream=0, iteration=0, first_prompt=0):
    return Draw(seed, stream, iteration, first_prompt)


@functools.cache
def cached_sampler(kind, sampling, slots, max_prompt):
    return make_sampler(kind(), sampling, slots=slots, max_prompt=max_prompt)


def sample_table(prompts, table=None, draw=None, kind=TableModel, slots=None, steps=False, **settings):
    settings = dict(group_size=1, max_response=5, stop_ids=(STOP,), pad_id=PAD) | settings
    padded = left_padded(prompts)
    slots = slots or len(prompts) * settings["group_size"]
    sample = cached_sampler(kind, Sampling(**settings), slots, padded.tokens.shape[1])
    sampled = sample(count_up() if table is None else table, padded, draw or make_draw())
    return sampled if steps else sampled.rollout


# --- stopping ---


@pytest.mark.parametrize("last, response, truncated", [
    (8, [9, 0, 0, 0, 0], False),  # the stop token first
    (7, [8, 9, 0, 0, 0], False),
    (4, [5, 6, 7, 8, 9], False),  # in the last slot: finished, not truncated
    (3, [4, 5, 6, 7, 8], True),  # never: it would have come next
    (9, [10, 11, 0, 1, 2], True),  # a stop token in the prompt and the pad token sampled mean nothing
])  # fmt: skip
def test_a_response_ends_with_its_stop_token(last, response, truncated):
    rollout = sample_table([[1, last]])
    np.testing.assert_array_equal(rollout.response, [response])
    length = 5 if truncated else response.index(STOP) + 1
    np.testing.assert_array_equal(rollout.response_mask, [np.arange(5) < length])
    np.testing.assert_array_equal(rollout.truncated, [truncated])
    np.testing.assert_allclose(rollout.logprobs, 0, atol=1e-6)  # near certain where sampled, 0 behind
    np.testing.assert_array_equal(rollout.logprobs[:, length:], 0)


def test_rows_stop_each_on_their_own():
    rollout = sample_table([[8], [3], [6]], group_size=2)
    expected = [[9, 0, 0, 0, 0]] * 2 + [[4, 5, 6, 7, 8]] * 2 + [[7, 8, 9, 0, 0]] * 2
    np.testing.assert_array_equal(rollout.response, expected)
    np.testing.assert_array_equal(rollout.response_mask.sum(axis=1), [1, 1, 5, 5, 3, 3])
    np.testing.assert_array_equal(rollout.truncated, [False, False, True, True, False, False])


def test_padding_takes_the_pad_id():
    rollout = sample_table([[8]], pad_id=11)
    np.testing.assert_array_equal(rollout.response, [[9, 11, 11, 11, 11]])


@pytest.mark.parametrize("stop_ids, response", [
    ((9, 6), [5, 6, 0, 0, 0]),  # whichever comes first
    ((), [5, 6, 7, 8, 9]),  # none: always to the end
])  # fmt: skip
def test_there_may_be_several_stop_tokens_or_none(stop_ids, response):
    rollout = sample_table([[4]], stop_ids=stop_ids)
    np.testing.assert_array_equal(rollout.response, [response])
    np.testing.assert_array_equal(rollout.truncated, [not stop_ids])


@pytest.mark.parametrize("lasts, steps", [
    ([8, 8], 1),  # both stop with the first token
    ([8, 6], 3),  # the longer needs 3 tokens
    ([8, 10], 64),  # one never stops: all 64 slots
])  # fmt: skip
def test_the_loop_ends_with_the_last_row(lasts, steps):
    table = count_up()
    table[11] = 20 * np.eye(12)[10]  # 10, 11, 10, 11, ...
    assert sample_table([[last] for last in lasts], table=table, max_response=64, steps=True).row_steps == 2 * steps


# --- drawing ---


def random_table(size=12, seed=0):
    return np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)


def test_greedy_follows_the_likeliest_token_with_logprobs_at_temperature_one():
    table = random_table()
    rollout = sample_table([[1], [2]], table=table, temperature=0.0, stop_ids=())
    for row, token in enumerate((1, 2)):
        for column in range(5):
            logprobs = np.asarray(jax.nn.log_softmax(table[token]))
            token = int(np.argmax(table[token]))
            assert rollout.response[row, column] == token
            assert rollout.logprobs[row, column] == pytest.approx(logprobs[token], abs=1e-6)


def test_logprobs_are_those_of_the_tempered_distribution_untouched_by_top_p_and_top_k():
    # Odds 5 : 3 : 2 at temperature 1/2 are 25 : 9 : 4 of 38. top-k 2 leaves two tokens, top-p 0.5 the first alone:
    # the draw is certain, the log-probability is still log(25 / 38).
    table = np.log(np.tile(np.array([5.0, 3.0, 2.0], np.float32), (3, 1)))
    rollout = sample_table([[1]], table=table, temperature=0.5, top_k=2, top_p=0.5, stop_ids=())
    np.testing.assert_array_equal(rollout.response, [[0] * 5])
    np.testing.assert_allclose(rollout.logprobs, np.log(25 / 38), rtol=1e-5)


@pytest.mark.parametrize("top_p, top_k, kept", [
    (1.0, 0, [0, 1, 2, 3]),
    (1.0, 2, [0, 1]),
    (1.0, 99, [0, 1, 2, 3]),  # more than there are
    (0.75, 0, [0, 1]),  # 0.5 is not enough, 0.5 + 0.3 is
    (0.85, 0, [0, 1, 2]),
    (0.45, 0, [0]),
    (1e-6, 0, [0]),  # at least one
    (0.6, 2, [0]),  # of what top-k left 0.5 is 0.625, which is enough
])
def test_top_p_and_top_k_by_hand(top_p, top_k, kept):
    probabilities = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    orders = np.array(list(itertools.permutations(range(4))))  # the order of the vocabulary does not matter
    finite = np.isfinite(restrict(jnp.log(probabilities[orders]), top_p, top_k))
    for order, row in zip(orders, finite, strict=True):
        assert sorted(order[row].tolist()) == kept


def test_ties_at_the_border_are_all_kept():
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]], jnp.float32))
    assert np.isfinite(restrict(logits, 0.3, 0)).all()
    assert np.isfinite(restrict(logits, 1.0, 1)).all()


def test_drawn_frequencies_are_the_probabilities():
    # 12 tokens of 700 have a probability, over three blocks, the last of them partial. Chi-square with 11 degrees of freedom
    # exceeds 31.26 once in a thousand seeds; this seed is fixed.
    weights = np.arange(1.0, 13.0)
    places = np.array([0, 1, 5, 254, 255, 256, 300, 511, 512, 600, 698, 699])
    probabilities = np.zeros(700, np.float32)
    probabilities[places] = weights / weights.sum()
    draws = 20000
    uniform = jax.random.uniform(jax.random.key(1), (draws,))
    tokens = np.asarray(jax.jit(inverse_cdf)(jnp.broadcast_to(probabilities, (draws, 700)), uniform))
    counts = np.bincount(tokens, minlength=700)
    assert counts.sum() == counts[places].sum() == draws
    expected = draws * weights / weights.sum()
    assert ((counts[places] - expected) ** 2 / expected).sum() < 31.26


@pytest.mark.parametrize("uniform, token", [
    (0.0, 1),  # not token 0, whose probability is 0
    (0.2499, 1),
    (0.25, 3),  # the running sum must exceed it
    (0.5, 600),
    (1 - 2**-24, 600),  # not one of the zeros behind, nor of the padding of the last block
])
def test_inverse_cdf_by_hand(uniform, token):
    probabilities = np.zeros((1, 700), np.float32)
    probabilities[0, [1, 3, 600]] = 0.25, 0.25, 0.5
    assert inverse_cdf(jnp.asarray(probabilities), jnp.array([uniform], jnp.float32)).tolist() == [token]


@pytest.mark.parametrize("vocabulary, edges", [
    (40, "tokens"), (300, "tokens"), (1000, "tokens"),
    (5000, "blocks"),  # a plain count of the sums below the target fails here: block sums are not quite ascending
])  # fmt: skip
def test_no_token_of_probability_zero_is_ever_drawn(vocabulary, edges):
    # Half the tokens are 0, and so are the first of each block and the last ones. The numbers drawn lie on the edges
    # between tokens or blocks, where the rounding of a parallel running sum decides, and at both ends.
    rng = np.random.default_rng(0)
    rows = 1024
    probabilities = rng.random((rows, vocabulary)) ** 4 * (rng.random((rows, vocabulary)) < 0.5)
    probabilities[:, ::CDF_BLOCK] = probabilities[:, -20:] = 0
    probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)
    places = rng.integers(0, vocabulary, rows)
    if edges == "blocks":
        places = np.maximum(places // CDF_BLOCK, 1) * CDF_BLOCK
    at_edges = np.cumsum(probabilities.astype(np.float64), axis=1)[np.arange(rows), places]
    draw = jax.jit(inverse_cdf)
    for uniform in (0 * at_edges, *(at_edges + step * 2.0**-24 for step in range(-3, 4)), 0 * at_edges + 1):
        tokens = np.asarray(draw(probabilities, np.clip(uniform, 0, 1 - 2.0**-24).astype(np.float32)))
        assert (tokens < vocabulary).all()
        assert (probabilities[np.arange(rows), tokens] > 0).all()


def test_a_banned_token_is_not_drawn_at_any_temperature():
    logits = jnp.full((64, 300), -jnp.inf).at[:, 7].set(3.0)
    keys = jax.random.split(jax.random.key(0), 64)
    sampling = Sampling(1, 1, (), PAD, temperature=1.3)
    token, logprob = jax.jit(draw_tokens, static_argnums=3)(logits, keys, jnp.zeros(64, jnp.int32), sampling)
    assert set(token.tolist()) == {7}
    np.testing.assert_allclose(logprob, 0, atol=1e-6)


# --- randomness is named by (seed, stream, iteration, prompt, sample, token) ---


# Group 3, 8 slots, no stop: one program for all of these but for another number of prompts, samples or slots.
RANDOM = dict(table=random_table(), group_size=3, max_response=8, stop_ids=())


def test_a_response_depends_on_its_own_numbers_alone():
    together = sample_table([[1], [2], [3], [4]], **RANDOM)
    alone = sample_table([[3]], **RANDOM, draw=make_draw(first_prompt=2))
    np.testing.assert_array_equal(alone.response, together.response[6:9])
    np.testing.assert_array_equal(alone.logprobs, together.logprobs[6:9])
    fewer = sample_table([[3]], **RANDOM | {"group_size": 2, "max_response": 4}, draw=make_draw(first_prompt=2))
    np.testing.assert_array_equal(fewer.response, together.response[6:8, :4])


def test_the_order_of_other_prompts_does_not_matter():
    one = sample_table([[1], [2], [3], [4]], **RANDOM)
    other = sample_table([[4], [2], [1], [4]], **RANDOM)
    np.testing.assert_array_equal(one.response[3:6], other.response[3:6])
    np.testing.assert_array_equal(one.response[9:], other.response[9:])


def test_seed_stream_iteration_and_prompt_all_count_and_none_stands_in_for_another():
    # Keys that were sums of the numbers would give the same tokens for 1 in any of them.
    names = ("seed", "stream", "iteration", "first_prompt")
    draws = [make_draw(), *(make_draw(**{name: 1}) for name in names)]
    responses = [sample_table([[1]], **RANDOM, draw=draw).response for draw in draws]
    assert len({tuple(row) for response in responses for row in response.tolist()}) == 3 * len(draws)


def test_the_samples_of_a_group_and_equal_prompts_differ():
    rollout = sample_table([[1]] * 4, **RANDOM)
    assert len({tuple(row) for row in rollout.response.tolist()}) == 12


# --- slots: nothing of how responses are seated changes one ---

LONG = dict(table=random_table(), kind=SumModel, group_size=3, max_response=200, stop_ids=(3,))
SEVERAL = [[1], [2, 7], [3, 1, 1], [4], [5, 6], [6, 6, 6], [11]]


@functools.cache
def seated_at_once():
    """All 21 responses in slots of their own, decoded to the end; of uneven length, some cut off."""
    rollout = sample_table(SEVERAL, **LONG)
    lengths = rollout.response_mask.sum(axis=1)
    assert lengths.min() < 5 and lengths.max() > 60 and len(set(lengths)) > 10
    return rollout


def assert_same(rollout, expected):
    for ours, theirs in zip(rollout, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("slots", [1, 2, 4, 5, 20, 64])
def test_slots_may_be_fewer_or_more_than_the_responses(slots):
    sampled = sample_table(SEVERAL, **LONG, slots=slots, steps=True)
    assert_same(sampled.rollout, seated_at_once())
    if slots == 1:  # no row is ever computed for nothing
        assert sampled.row_steps == sampled.rollout.response_mask.sum()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_tokens_may_be_fetched_in_chunks_of_any_size(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    sample = make_sampler(SumModel(), Sampling(3, 200, (3,), PAD), slots=8, max_prompt=3)
    assert_same(sample(LONG["table"], left_padded(SEVERAL), make_draw()).rollout, seated_at_once())


def test_prompts_may_be_prefilled_one_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 1)
    sample = make_sampler(SumModel(), Sampling(3, 200, (3,), PAD), slots=8, max_prompt=3)
    assert sample.held == 1
    assert_same(sample(LONG["table"], left_padded(SEVERAL), make_draw()).rollout, seated_at_once())


def test_the_last_responses_move_together_into_fewer_rows():
    # 21 slots in three sizes of program; without the smaller ones the longest response would hold all 21 to its end.
    assert module.sizes_of(21, 200) == [21, 10, 5]
    sampled = sample_table(SEVERAL, **LONG, steps=True)
    lengths = seated_at_once().response_mask.sum(axis=1)
    assert sampled.row_steps < 0.7 * 21 * lengths.max()


@pytest.mark.parametrize("rows, max_response, sizes", [
    (256, 16, [256]),  # short responses: not worth another program
    (256, 128, [256, 128]),
    (256, 8192, [256, 128, 64, 32]),
    (12, 8192, [12, 6]),  # not below 4 rows
    (1, 8192, [1]),
])
def test_sizes_of_the_decode_programs(rows, max_response, sizes):
    assert module.sizes_of(rows, max_response) == sizes


def test_a_waiting_response_gets_a_slot_long_before_the_last_ends():
    # One response of 200 tokens and 40 of 1: in two slots they take as long as the long one.
    table = count_up()
    table[11] = 20 * np.eye(12)[10]  # 10, 11, 10, ... for ever
    sampled = sample_table([[10], *[[8]] * 40], table=table, slots=2, max_response=200, steps=True)
    assert sampled.rollout.response_mask.sum(axis=1).tolist() == [200] + [1] * 40
    assert sampled.row_steps == 2 * 200


def test_every_response_is_told_of_once_when_it_ends():
    told = []
    sample = cached_sampler(SumModel, Sampling(3, 200, (3,), PAD), 4, 3)
    sampled = sample(LONG["table"], left_padded(SEVERAL), make_draw(), lambda *one: told.append(one))
    assert sorted(response for response, _ in told) == list(range(21))
    assert [response for response, _ in told] != list(range(21))  # some overtake others
    for response, tokens in told:
        np.testing.assert_array_equal(tokens, sampled.rollout.response[response][sampled.rollout.response_mask[response]])


# --- the real model, on one device and on eight ---

REAL = Sampling(group_size=2, max_response=6, stop_ids=(5, 6, 7, 8), pad_id=0, temperature=0.8)
PROMPTS = random_prompts(8, 4)


def real_sampler(mesh_name, slots=16, max_prompt=4):
    """(sampler, function from (prompts, draw) to a rollout), arguments placed as the trainer does."""
    model, params = tiny_model(mesh_name), tiny_params(mesh_name)
    sample = make_sampler(model, REAL, slots=slots, max_prompt=max_prompt)
    weights = jax.jit(model.cast, out_shardings=parameter_shardings(model.config, model.mesh, DECODE_RULES))(params)
    return sample, lambda prompts, draw: sample(weights, left_padded(prompts, max_prompt), draw).rollout


@pytest.fixture(scope="module")
def real():
    return real_sampler("one device")[1](PROMPTS, make_draw())


def test_responses_of_the_real_model_stop_early_and_late(real):
    # Otherwise the tests below would say little.
    lengths = real.response_mask.sum(axis=1)
    assert lengths.min() < 4 and real.truncated.any() and not real.truncated.all()


def test_logprobs_are_the_trainers(real):
    groups, ones = np.zeros(8, np.int32), np.ones(16, np.float32)
    experience = Experience(left_padded(PROMPTS), real, real.logprobs, ones > 0, ones, groups)
    examples = to_examples(experience, range(16), ones, ones, ones)
    (batch,) = pack(examples, rows=10, tokens_per_row=20)
    model, params = tiny_model(), tiny_params()
    hidden = model.hidden(params, batch.tokens, batch.segment, batch.position)
    logprobs, _ = token_logprobs(hidden, model.unembedding(params), batch.tokens, temperature=0.8, chunk=8)
    assert batch.loss_mask.sum() == real.response_mask.sum() > 40
    assert batch.segment.max() > 1  # rows do hold several sequences
    np.testing.assert_allclose(logprobs[batch.loss_mask], batch.sampler_logprobs[batch.loss_mask], atol=1e-5)


def test_longer_prompts_beside_it_change_nothing(real):
    # Prompt 4 has 1 token: beside others it had 3 slots of padding, here there is none.
    assert len(PROMPTS[4]) == 1
    rollout = real_sampler("one device", slots=2, max_prompt=1)[1](PROMPTS[4:5], make_draw(first_prompt=4))
    np.testing.assert_array_equal(rollout.response, real.response[8:10])
    np.testing.assert_allclose(rollout.logprobs, real.logprobs[8:10], atol=1e-5)


@pytest.mark.parametrize("mesh_name, slots", [
    ("one device", 3),
    *((name, slots) for name in MESHES if name != "one device" for slots in (16, 8)),  # 8: refilled, at most 2 slots a replica
])
def test_slots_and_devices_sample_the_same_tokens_with_programs_compiled_once(real, mesh_name, slots):
    _, run = real_sampler(mesh_name, slots)
    rollout = run(PROMPTS, make_draw())
    for ours, expected in zip(rollout, real, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    with compilations() as compiled:
        other = run(PROMPTS[::-1], make_draw(iteration=1))
    assert not compiled
    assert (other.response != rollout.response).any()


def test_more_replicas_than_prompts_leave_some_idle(real):
    rollout = real_sampler("data 8")[1](PROMPTS[:3], make_draw())
    for ours, expected in zip(rollout, real, strict=True):
        np.testing.assert_allclose(ours, expected[:6], atol=1e-5)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_programs_compiled_ahead_are_those_that_run(mesh_name):
    sample, _ = real_sampler(mesh_name, slots=5)
    weights = jax.eval_shape(lambda: tiny_params("one device"))
    model = tiny_model(mesh_name)
    shardings = parameter_shardings(model.config, model.mesh, DECODE_RULES)
    weights = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), weights, shardings)
    programs = sample.programs(weights)
    assert [program.name for program in programs] == ["start", "prefill", "insert", f"decode {sample.rows}"]
    for program in programs:
        compile_program(program)
    params = jax.device_put(jax.device_get(tiny_params("one device")), shardings)
    jax.block_until_ready(params)
    with compilations() as compiled:
        sample(params, left_padded(PROMPTS, 4), make_draw())
    assert not compiled


@functools.cache
def greedy_rollout(mesh_name, int8_weights, int8_cache):
    model, sampling = tiny_model(mesh_name), REAL._replace(temperature=0.0, stop_ids=())
    sample = make_sampler(model, sampling, slots=8, max_prompt=4, int8_cache=int8_cache)
    decode_params = make_decode_params(SimpleNamespace(model=model, mesh=model.mesh), int8_weights)(tiny_params(mesh_name))
    return sample(decode_params, left_padded(PROMPTS, 4), make_draw()).rollout


@pytest.mark.parametrize("int8_weights, int8_cache", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mesh_name", ["one device", "fsdp 4 x tensor 2"])
def test_eight_bits_move_log_probabilities_a_little(mesh_name, int8_weights, int8_cache):
    # Greedy at first: the same responses as long as no two tokens are close; then their log-probabilities can be compared.
    exact, rounded = greedy_rollout(mesh_name, False, False), greedy_rollout(mesh_name, int8_weights, int8_cache)
    same = np.cumsum(exact.response != rounded.response, axis=1) == 0
    assert same.mean() > 0.8
    gap = np.abs(exact.logprobs - rounded.logprobs)[same]
    assert 1e-5 < gap.max() < 0.2  # they are rounded, and not by much
