"""Chunked log-probabilities against the plain ones, and that the chunks are worth it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.rl.logprobs import token_logprobs
from dgpo_jax.sharding import make_mesh, sharding_for

ROWS, SLOTS, WIDTH, VOCABULARY = 2, 10, 8, 37


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, SLOTS, WIDTH)).astype(np.float32)
    unembedding = rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    return hidden, unembedding, rng.integers(0, VOCABULARY, (ROWS, SLOTS)).astype(np.int32)


def plain(hidden, unembedding, tokens, temperature):
    """Slot t: what slot t - 1 says of token t; slot 0 is left out."""
    logprobs = jax.nn.log_softmax(hidden[:, :-1] @ unembedding / temperature, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@pytest.mark.parametrize("chunk, temperature", [
    (1, 1.0), (5, 0.7), (10, 1.0),  # of 10 slots
    (4, 1.0), (4, 0.7),  # does not divide them
    (64, 1.0),  # more than there are
])  # fmt: skip
def test_chunks_change_neither_logprobs_nor_entropy(inputs, chunk, temperature):
    logprobs, entropy = jax.jit(token_logprobs, static_argnames=("temperature", "chunk"))(
        *inputs, temperature=temperature, chunk=chunk
    )
    assert logprobs.shape == entropy.shape == (ROWS, SLOTS)
    expected = plain(*map(jnp.asarray, inputs), temperature)
    np.testing.assert_allclose(logprobs[:, 1:], expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy[:, 1:], expected[1], atol=1e-5)


def test_a_row_by_hand():
    # The logits of slot 0 are (0, 2 log 3); divided by temperature 2 the odds are 1 to 3.
    hidden = jnp.array([[[2 * np.log(3.0)], [50.0]]], jnp.float32)
    logprobs, entropy = token_logprobs(
        hidden, jnp.array([[0.0, 1.0]]), jnp.array([[1, 0]], jnp.int32), temperature=2.0, chunk=8
    )
    np.testing.assert_allclose(logprobs[0, 1], np.log(1 / 4), rtol=1e-6)
    np.testing.assert_allclose(entropy[0, 1], -(np.log(1 / 4) / 4 + 3 * np.log(3 / 4) / 4), rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 5])
def test_the_gradient_is_that_of_the_plain_formula(inputs, chunk):
    hidden, unembedding, tokens = map(jnp.asarray, inputs)
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, SLOTS - 1)), jnp.float32)

    def chunked_sum(hidden, unembedding):
        logprobs, entropy = token_logprobs(hidden, unembedding, tokens, temperature=0.7, chunk=chunk)
        return jnp.sum(pull * logprobs[:, 1:]) + jnp.sum(entropy)  # the entropy is only watched: it adds nothing

    def plain_sum(hidden, unembedding):
        return jnp.sum(pull * plain(hidden, unembedding, tokens, 0.7)[0])

    ours, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(hidden, unembedding) for f in (chunked_sum, plain_sum))
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_many_chunks_round_the_gradient_of_the_output_matrix_no_more_than_one():
    rng = np.random.default_rng(2)
    hidden, unembedding = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((2, 512, 16), (16, 64)))
    tokens = jnp.asarray(rng.integers(0, 64, (2, 512)), jnp.int32)

    def gradient(dtype, chunk):
        def total(unembedding):
            return jnp.sum(token_logprobs(hidden.astype(dtype), unembedding, tokens, temperature=1.0, chunk=chunk)[0])

        return np.asarray(jax.jit(jax.grad(total))(unembedding.astype(dtype)).astype(jnp.float32))

    exact = gradient(jnp.float32, 512)
    one, many = (np.linalg.norm(gradient(jnp.bfloat16, chunk) - exact) for chunk in (512, 4))
    assert many < 1.1 * one  # added up in bfloat16, 128 chunks give six times the error


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_logits_of_all_slots_are_never_held(entropy_gradient):
    rows, slots, width, vocabulary = 2, 256, 8, 512
    arguments = (
        jax.ShapeDtypeStruct((rows, slots, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((rows, slots), jnp.int32),
    )

    def temporaries(chunk):
        def total(hidden, unembedding, tokens):
            logprobs, entropy = token_logprobs(
                hidden, unembedding, tokens, temperature=1.0, chunk=chunk, entropy_gradient=entropy_gradient
            )
            return jnp.sum(logprobs) + jnp.sum(entropy)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * rows * slots * vocabulary  # 1 MiB
    assert temporaries(chunk=rows * slots) >= all_logits  # the measure sees them where they are
    assert temporaries(chunk=16) < all_logits / 4  # a chunk's are 1/32 of it


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])  # of 10 slots: 4 does not divide them, 64 is more than there are
def test_the_gradient_with_an_entropy_bonus_is_that_of_the_plain_formula_in_float64(inputs, chunk):
    hidden, unembedding, tokens = inputs
    logprob_pull, entropy_pull = np.random.default_rng(3).normal(size=(2, ROWS, SLOTS - 1))

    def total(logprobs, entropy):
        return jnp.sum(logprob_pull.astype(logprobs.dtype) * logprobs) + jnp.sum(
            entropy_pull.astype(entropy.dtype) * entropy
        )

    def chunked(hidden, unembedding):
        outputs = token_logprobs(hidden, unembedding, tokens, temperature=0.7, chunk=chunk, entropy_gradient=True)
        return total(*(x[:, 1:] for x in outputs))

    ours = jax.jit(jax.grad(chunked, argnums=(0, 1)))(hidden, unembedding)
    with jax.enable_x64(True):
        exact = jax.grad(lambda *weights: total(*plain(*weights, jnp.asarray(tokens), 0.7)), argnums=(0, 1))(
            jnp.asarray(hidden, jnp.float64), jnp.asarray(unembedding, jnp.float64)
        )
    for one, other in zip(ours, exact, strict=True):
        assert other.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())  # f32 rounds at 6e-8


def test_the_entropy_gradient_is_that_of_finite_differences(inputs):
    # In numpy and f64, so that neither the formula nor JAX's differentiation is shared with what is tested.
    hidden, unembedding, tokens = inputs
    pull = np.random.default_rng(4).normal(size=(ROWS, SLOTS - 1))
    steps = [np.random.default_rng(5).normal(size=x.shape) for x in (hidden, unembedding)]

    def plain_sum(size):
        logits = (hidden + size * steps[0])[:, :-1] @ (unembedding + size * steps[1]) / 0.7
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        return -np.sum(pull * np.sum(probabilities * np.log(probabilities), axis=-1))

    def chunked_sum(hidden, unembedding):
        entropy = token_logprobs(hidden, unembedding, tokens, temperature=0.7, chunk=4, entropy_gradient=True)[1]
        return jnp.sum(pull.astype(np.float32) * entropy[:, 1:])

    gradients = jax.grad(chunked_sum, argnums=(0, 1))(hidden, unembedding)
    ours = sum(np.sum(np.asarray(g, np.float64) * step) for g, step in zip(gradients, steps, strict=True))
    np.testing.assert_allclose(ours, (plain_sum(1e-5) - plain_sum(-1e-5)) / 2e-5, rtol=1e-5)


def test_an_entropy_that_is_only_watched_has_no_gradient(inputs):
    hidden, unembedding, tokens = inputs

    def entropy_sum(hidden, unembedding):
        return jnp.sum(token_logprobs(hidden, unembedding, tokens, temperature=0.7, chunk=4)[1])

    for gradient in jax.grad(entropy_sum, argnums=(0, 1))(hidden, unembedding):
        np.testing.assert_array_equal(gradient, 0)


def test_the_flag_changes_neither_output(inputs):
    one, other = (token_logprobs(*inputs, temperature=0.7, chunk=4, entropy_gradient=flag) for flag in (False, True))
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Two rows of ten slots: 5 and 3 are asked for, not one behind the other; slot 0 never is.
ASKED = np.array([[0, 1, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])  # of 8 that are asked for, 20 in all
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_slots_that_are_asked_for_are_as_if_all_were_also_in_the_gradient(inputs, chunk, entropy_gradient):
    hidden, unembedding, tokens = inputs
    pulls = np.random.default_rng(6).normal(size=(2, ROWS, SLOTS)).astype(np.float32) * ASKED

    def total(hidden, unembedding, mask):
        outputs = token_logprobs(
            hidden, unembedding, tokens, mask, temperature=0.7, chunk=chunk, entropy_gradient=entropy_gradient
        )
        return sum(jnp.sum(pull * jnp.where(ASKED, x, 0.0)) for pull, x in zip(pulls, outputs, strict=True)), outputs

    graded = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnums=())
    (_, some), some_gradient = graded(hidden, unembedding, ASKED)
    (_, whole), whole_gradient = graded(hidden, unembedding, np.ones_like(ASKED))
    for one, other in zip(some, whole, strict=True):
        np.testing.assert_allclose(one[ASKED], other[ASKED], rtol=1e-6)
    for one, other in zip(some_gradient, whole_gradient, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_logits_are_made_of_slots_that_nobody_asks_for(inputs):
    # Their hidden states are NaN, which would reach the output matrix's gradient through any product.
    hidden, unembedding, tokens = inputs
    hidden = np.where(np.roll(ASKED, -1, axis=1)[..., None], hidden, np.nan)  # slot t predicts slot t + 1

    def total(hidden, unembedding, chunk):
        logprobs, entropy = token_logprobs(hidden, unembedding, tokens, ASKED, temperature=1.0, chunk=chunk)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    graded = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    value, (to_hidden, to_unembedding) = graded(hidden, unembedding, 4)  # two chunks of 4 hold the 8, of five
    assert np.isfinite(value) and np.isfinite(to_unembedding).all()
    assert not to_hidden[~np.roll(ASKED, -1, axis=1)].any()
    assert not np.isfinite(graded(hidden, unembedding, 5)[0])  # the second of four chunks holds two others


def test_where_nobody_asks_for_anything_all_is_zero(inputs):
    hidden, unembedding, tokens = inputs

    def total(hidden, unembedding):
        return sum(jnp.sum(x) for x in token_logprobs(hidden, unembedding, tokens, 0 * ASKED > 0, temperature=1.0, chunk=4))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, unembedding)
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


MESH_SIZES = [
    {"data": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 1, "context": 8}
]  # fmt: skip


def on_mesh(sizes):
    """(the function (hidden, unembedding) -> sum of pulled log-probabilities, its arguments there, in numpy)."""
    mesh, rng = make_mesh(**{"data": 1} | sizes), np.random.default_rng(7)
    arrays = [
        rng.normal(size=(8, 16, 8)).astype(np.float32), rng.normal(size=(8, 64)).astype(np.float32),
        rng.integers(0, 64, (8, 16)).astype(np.int32), rng.random((8, 16)) < 0.4,
    ]  # fmt: skip
    axes = [("batch", "tokens", None), ("width", "vocab"), ("batch", "tokens"), ("batch", "tokens")]
    shardings = [sharding_for(mesh, names) for names in axes]

    def total(hidden, unembedding, tokens, mask, mesh=mesh):
        outputs = token_logprobs(
            hidden, unembedding, tokens, mask, temperature=0.7, chunk=4, entropy_gradient=True, mesh=mesh
        )
        return sum(jnp.sum(jnp.where(mask, x, 0.0) * tokens.astype(jnp.float32)) for x in outputs)

    return total, arrays, shardings


@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_devices_with_slots_of_their_own_change_nothing(sizes):
    total, arrays, shardings = on_mesh(sizes)
    ours = jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=tuple(shardings[:2]))(*jax.device_put(arrays, shardings))
    expected = jax.jit(jax.grad(lambda *them: total(*them, mesh=None), argnums=(0, 1)))(*arrays)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("sizes", MESH_SIZES)
def test_the_devices_gradients_of_the_output_matrix_are_added_up_once_and_not_in_every_chunk(sizes):
    total, arrays, shardings = on_mesh(sizes)
    program = jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=tuple(shardings[:2]))
    text = program.lower(*jax.device_put(arrays, shardings)).compile().as_text()
    loops = [part for part in re.split(r"\n(?=(?:ENTRY )?%)", text) if not part.startswith("ENTRY")]
    exchanged = re.findall(r"f32\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter|all-gather|all-to-all)\(", "\n".join(loops))
    # Within a chunk only `tensor` devices talk: of numbers for each slot, and of the gradient by the hidden states.
    assert all(sizes.get("tensor") and np.prod([int(size) for size in shape.split(",")]) <= 4 * 8 for shape in exchanged)
    assert re.search(r" (?:all-reduce|reduce-scatter)\(", text)  # the pattern finds what is there
