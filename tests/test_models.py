"""The model agrees with itself: packed, padded, cached, chunked, remade and on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dgpo_jax.config import ModelConfig
from dgpo_jax.models import build, decoding
from dgpo_jax.models.attention import attention
from dgpo_jax.models.layers import Projection, rotary_frequencies
from dgpo_jax.models.parameters import abstract_parameters, decays, parameter_count, table
from dgpo_jax.models.qwen import count_positions
from dgpo_jax.sharding import make_mesh
from dgpo_jax.types import KVCache

SIZES = dict(vocab_size=32, layers=2, width=16, heads=4, key_heads=2, head_width=4, mlp_width=24,
             initializer_std=0.3, dtype="float32")  # fmt: skip
CONFIG = ModelConfig(**SIZES, qkv_bias=True, qk_norm=True, tied_embeddings=False)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def params():
    return build(CONFIG).init(jax.random.key(0))


def random_tokens(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 32, (rows, columns)).astype(np.int32)


def test_packed_sequences_give_the_logits_they_have_alone(params):
    model = build(CONFIG)
    tokens = random_tokens(1, 9)
    segment = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    packed = model.logits(params, tokens, segment)
    np.testing.assert_allclose(packed[:, :4], model.logits(params, tokens[:, :4]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:7], model.logits(params, tokens[:, 4:7]), atol=1e-5)


def test_left_padding_changes_nothing_and_padding_is_never_nan(params):
    model = build(CONFIG)
    tokens = random_tokens(1, 5)
    padded = np.pad(tokens, ((0, 0), (3, 0)), constant_values=7)
    segment = np.array([[0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    logits = model.logits(params, padded, segment)
    np.testing.assert_allclose(logits[:, 3:], model.logits(params, tokens), atol=1e-5)
    assert np.isfinite(logits).all()


def test_positions_start_again_in_each_segment():
    segment = jnp.array([[0, 0, 1, 1, 1, 2], [1, 1, 2, 3, 3, 0]], jnp.int32)
    np.testing.assert_array_equal(count_positions(segment), [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 1, 0]])


def test_prefill_and_decoding_give_the_hidden_states_of_a_full_forward(params):
    # Two sequences of 8 tokens; of the first 5 are prompt, of the second 3, and the cache has room to spare.
    model, tokens, length = build(CONFIG), random_tokens(2, 8), np.array([5, 3], np.int32)
    position = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    expected = model.hidden(params, tokens, np.ones_like(tokens), position)
    prompts = jax.jit(model.prefill)(params, tokens[:, :5], length)
    cache = jax.tree.map(lambda empty, part: empty.at[:, :2, :, :5].set(part), model.make_cache(3, 12), prompts)
    decode = jax.jit(model.decode)
    for step in range(-1, 3):  # the prompt's last token once more, as the sampler does, then three more
        place = length + np.int32(step)
        hidden, cache = decode(params, np.take_along_axis(tokens, place[:, None], axis=1)[:, 0], place, cache)
        np.testing.assert_allclose(hidden, np.take_along_axis(np.asarray(expected), place[:, None, None], axis=1)[:, 0], atol=1e-5)


@pytest.mark.parametrize("slots", [4, 64, 127, 128, 300, 1000])
def test_windows_of_the_cache_grow_by_halves_and_the_last_is_all(slots):
    sizes = decoding.windows(slots)
    assert sizes[-1] == slots and len(sizes) <= decoding.WINDOWS and sizes == sorted(set(sizes))
    assert len(sizes) == 1 or sizes[0] >= decoding.SMALLEST_WINDOW


@pytest.mark.parametrize("position", [0, 62, 63, 64, 127, 128, 129, 255, 256, 299])  # at and around the windows of 300 slots
def test_attention_in_a_window_is_that_of_all_slots(position, monkeypatch):
    rng = np.random.default_rng(0)
    cache = KVCache(*(jnp.asarray(rng.normal(size=(2, 3, 2, 300, 4)), jnp.float32) for _ in range(2)))
    query = jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32)  # two rows of a cache of three
    places = jnp.array([position, position // 2], jnp.int32)
    windowed = decoding.attend_window(query, cache, jnp.int32(1), places)
    for row, place in enumerate(places.tolist()):
        key, value = (np.asarray(part)[1, row, :, : place + 1] for part in cache)
        logits = np.einsum("kmh,ksh->kms", query[row], key) / 2
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(windowed[row], np.einsum("kms,ksh->kmh", weights, value), atol=1e-5)


def test_decoding_never_copies_the_whole_cache(params):
    model = build(CONFIG)
    cache = jax.eval_shape(lambda: model.make_cache(4, 4096))
    one = jax.ShapeDtypeStruct((4,), jnp.int32)

    def several(params, token, position, cache):  # in a loop, as the sampler does
        def body(_, carry):
            hidden, cache = model.decode(params, carry[0], position, carry[1])
            return hidden[:, 0].astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 3, body, (token, cache))

    memory = jax.jit(several, donate_argnums=3).lower(params, one, one, cache).compile().memory_analysis()
    keys = cache.key.size * 4
    assert memory.alias_size_in_bytes >= 2 * keys
    # One layer's slice of keys and values, and the logits: a copy would add 2 * keys.
    assert memory.temp_size_in_bytes < 2 * keys


def attention_inputs(tokens=13):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, tokens, 2, 3, 4)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, 2, tokens, 4)), jnp.float32) for _ in range(2))
    segment = jnp.asarray([[0] + [1] * (tokens - 1), [1] * 4 + [2] * (tokens - 5) + [0]], jnp.int32)
    position = count_positions(segment)
    return (query, key, value), (segment, position, segment, position)


def test_attention_of_two_tokens_by_hand():
    # Both keys are 0, so the second token weighs both values equally; the first sees only itself.
    value = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    ones, index = jnp.ones((1, 2), jnp.int32), jnp.arange(2, dtype=jnp.int32)[None]
    output = attention(jnp.ones((1, 2, 1, 1, 1)), jnp.zeros((1, 1, 2, 1)), value, ones, index, ones, index)
    np.testing.assert_allclose(output.ravel(), [1.0, 2.0])


@pytest.mark.parametrize("chunk", [4, 13, 64])  # with a last block that is part empty, exactly one, and none
def test_chunked_attention_equals_plain_attention_and_its_gradients(chunk):
    arrays, places = attention_inputs()

    def run(implementation):
        def loss(arrays):
            output = attention(*arrays, *places, implementation=implementation, chunk=chunk)
            return jnp.sum(jnp.sin(output)), output

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    for chunked, plain in zip(jax.tree.leaves(run("chunked")), jax.tree.leaves(run("plain")), strict=True):
        np.testing.assert_allclose(chunked, plain, atol=1e-5)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_a_query_that_attends_nothing_gives_zero_and_no_nan_gradient(implementation):
    arrays, places = attention_inputs()

    def run(arrays):
        return attention(*arrays, *places, implementation=implementation, chunk=4)

    output, gradient = run(arrays), jax.grad(lambda arrays: jnp.sum(run(arrays)))(arrays)
    np.testing.assert_array_equal(output[0, 0], 0.0)  # padding on the left
    np.testing.assert_array_equal(output[1, -1], 0.0)  # padding on the right
    assert all(np.isfinite(part).all() for part in gradient)
    np.testing.assert_array_equal(gradient[0][0, 0], 0.0)
    np.testing.assert_array_equal(gradient[2][0, :, 0], 0.0)  # and nobody attends the padding


def test_an_unknown_attention_is_refused():
    arrays, places = attention_inputs()
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of auto, plain, chunked"):
        attention(*arrays, *places, implementation="flash")


def loss_and_gradient(model, tokens, segment):
    def loss(params):
        logits = model.logits(params, tokens, segment)
        return jnp.mean(jnp.square(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 4, "tensor": 2}, {"data": 8}])
def test_eight_devices_give_the_logits_and_gradients_of_one(params, sizes):
    tokens, segment = random_tokens(8, 6), np.array([[0, 1, 1, 2, 2, 2]] * 8, np.int32)
    model = build(CONFIG, make_mesh(**sizes))
    sharded = model.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)  # the mesh does not change the random numbers
    (_, expected), expected_gradient = loss_and_gradient(build(CONFIG), tokens, segment)(params)
    (_, logits), gradient = loss_and_gradient(model, tokens, segment)(sharded)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_the_backward_pass_recomputes_does_not_change_gradients(params, remat):
    tokens, segment = random_tokens(2, 6), np.ones((2, 6), np.int32)
    gradient, expected = (
        loss_and_gradient(build(replace(CONFIG, remat=kind)), tokens, segment)(params)[1] for kind in (remat, "full")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)


def test_stacked_parameters_keep_the_layer_axis_in_their_sharding():
    mesh = make_mesh(1, 4, 2)
    abstract = abstract_parameters(CONFIG, mesh)["layers"]["attention"]
    assert abstract["query"]["kernel"].shape == (2, 16, 2, 2, 4)  # [L, D, K, M, H]
    assert abstract["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None, None)
    made = build(CONFIG, mesh).init(jax.random.key(0))["layers"]["attention"]["query"]["kernel"]
    assert made.sharding == abstract["query"]["kernel"].sharding
    assert made.addressable_shards[0].data.shape == (2, 4, 1, 2, 4)


def test_more_tensor_devices_than_key_heads_are_refused():
    with pytest.raises(ValueError, match=r"'key_heads' has size 2, which 4 devices .* lower mesh.tensor"):
        build(CONFIG, make_mesh(1, 2, 4))


def test_a_parameter_is_random_by_its_name_whatever_else_the_model_has(params):
    tied = ModelConfig(**SIZES, qkv_bias=False, tied_embeddings=True)
    other = build(tied).init(jax.random.key(0))
    assert "unembed" not in other and "bias" not in other["layers"]["attention"]["query"]
    np.testing.assert_array_equal(other["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"])


def test_parameters_are_counted_and_only_matrices_decay():
    # embed and unembed 2*32*16; a layer: q, o 2*16*16, k, v 2*16*8, q/k/v bias 32, q/k norm 8, norms 32, mlp 3*16*24
    assert parameter_count(CONFIG) == 1024 + 16 + 2 * (512 + 256 + 32 + 8 + 32 + 1152)
    flags = decays(CONFIG)
    assert flags["embed"]["table"] and flags["layers"]["mlp"]["down"]["kernel"]
    assert not flags["final_norm"]["scale"] and not flags["layers"]["attention"]["key"]["bias"]
    assert len(jax.tree.leaves(flags)) == len(table(CONFIG))


def test_bfloat16_decoding_weights_give_the_logits_of_the_masters(params):
    # Both paths multiply in bfloat16: casting once beforehand or layer by layer must be the same numbers.
    model = build(replace(CONFIG, dtype="bfloat16"))
    tokens = random_tokens(2, 5)
    np.testing.assert_array_equal(model.logits(params, tokens), model.logits(model.cast(params), tokens))
    assert model.make_cache(1, 4).key.dtype == jnp.bfloat16


def test_the_gradient_of_a_bfloat16_bias_is_added_up_in_float32():
    pull = jnp.asarray(np.random.default_rng(0).normal(1, 1, (8, 4096, 16)), jnp.bfloat16)
    x, kernel, bias = (jnp.zeros(size, jnp.bfloat16) for size in ((8, 4096, 1), (1, 16), (16,)))
    _, pull_back = jax.vjp(lambda bias: Projection({"kernel": kernel, "bias": bias}, "btd,df->btf")(x), bias)
    gradient = np.asarray(jax.jit(pull_back)(pull)[0].astype(jnp.float32))
    exact = np.asarray(pull.astype(jnp.float32), np.float64).sum((0, 1))
    np.testing.assert_allclose(gradient, exact, rtol=2**-8)  # rounded once, at the end


def test_yarn_keeps_fast_pairs_and_slows_the_others_by_the_factor():
    config = ModelConfig(head_width=128, rope_theta=1e6, rope_scaling="yarn", rope_factor=4.0, rope_original_length=32768)
    plain = rotary_frequencies(ModelConfig(head_width=128, rope_theta=1e6))[0]
    scaled, factor = rotary_frequencies(config)
    assert factor == pytest.approx(1.1386294)  # 0.1 * ln(4) + 1
    # Pair i turns 32768 / (2 pi 1e6^(i/64)) times: 32 turns at i = 23.6, one turn at i = 39.6.
    np.testing.assert_allclose(scaled[:24], plain[:24], rtol=1e-6)
    np.testing.assert_allclose(scaled[40:], plain[40:] / 4, rtol=1e-6)
    assert (scaled[24:40] < plain[24:40]).all()
