"""Model FLOPs: against a count by hand, and against what XLA counts in a program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.config import ModelConfig
from dgpo_jax.models import build
from dgpo_jax.models.flops import causal_pairs, forward_flops, rollout_flops, training_flops

SMALL = ModelConfig(vocab_size=11, layers=3, width=8, heads=4, key_heads=2, head_width=6, mlp_width=7)
# One layer by hand: query and output 8 x 24, key and value 8 x 12, gate, up and down 8 x 7.
NUMBERS = 3 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 7)


@pytest.mark.parametrize("tokens, pairs, predicted, expected", [
    (1, 0, 0, 2 * NUMBERS),
    (0, 1, 0, 4 * 3 * 4 * 6),  # one score and one weighted value for each of 3 x 4 heads of 6; key heads do not matter
    (0, 0, 1, 2 * 8 * 11),
    (10, 55, 4, 10 * 2 * NUMBERS + 55 * 288 + 4 * 176),
    (0, 0, 0, 0),
])
def test_a_forward_pass_is_matrices_and_attention_and_vocabulary(tokens, pairs, predicted, expected):
    assert forward_flops(SMALL, tokens, pairs, predicted) == expected


def test_neither_biases_nor_norms_nor_tying_the_embedding_changes_the_count():
    other = replace(SMALL, qkv_bias=False, qk_norm=True, tied_embeddings=False)
    assert forward_flops(other, 7, 28, 7) == forward_flops(SMALL, 7, 28, 7)


@pytest.mark.parametrize("length, before, expected", [
    (4, 0, 1 + 2 + 3 + 4),
    (3, 10, 11 + 12 + 13),
    (0, 10, 0),
    (1, 0, 1),
])
def test_each_token_attends_itself_and_what_came_before(length, before, expected):
    assert causal_pairs(length, before) == expected
    assert causal_pairs(np.array([length, length]), before).tolist() == [expected] * 2


def test_counts_of_long_rows_do_not_overflow_32_bits():
    assert causal_pairs(np.array([100_000], np.int32))[0] == 5_000_050_000
    assert training_flops(SMALL, np.full(1000, 50_000, np.int32), np.full(1000, 50_000, np.int32)) > 1e15


def test_sampling_runs_each_prompt_once_and_all_but_the_last_token_of_each_response():
    # Prompts of 3 and 2 tokens, two responses each.
    prompts, responses = np.array([3, 2]), np.array([4, 1, 2, 2])
    tokens = 3 + 2 + (3 + 0 + 1 + 1)
    pairs = (1 + 2 + 3) + (1 + 2) + (4 + 5 + 6) + 0 + 3 + 3
    predicted = 2 + (3 + 0 + 1 + 1)  # the first token of every response comes from its prompt's logits
    assert rollout_flops(SMALL, prompts, responses) == forward_flops(SMALL, tokens, pairs, predicted)


def test_learning_takes_three_forward_passes_and_each_scoring_one_more():
    prompts, responses = np.array([3, 2]), np.array([2, 4])
    forward = forward_flops(SMALL, 11, (1 + 2 + 3 + 4 + 5) + (1 + 2 + 3 + 4 + 5 + 6), 6)
    assert training_flops(SMALL, prompts, responses) == 3 * forward
    assert training_flops(SMALL, prompts, responses, scorings=2) == 5 * forward


def test_learning_from_nothing_is_no_work():
    assert training_flops(SMALL, np.zeros(0, int), np.zeros(0, int), scorings=1) == 0


# One layer, because XLA counts the body of a loop once; wide, so that its elementwise operations are lost in the matrices.
WIDE = ModelConfig(
    vocab_size=512, layers=1, width=256, heads=8, key_heads=2, head_width=32, mlp_width=1024, dtype="float32", remat="none",
    attention="plain", tied_embeddings=False,
)  # fmt: skip
ROWS, TOKENS = 2, 64


def counted(function, *arguments):
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.fixture(scope="module")
def program():
    model = build(WIDE)
    tokens = jnp.zeros((ROWS, TOKENS), jnp.int32)
    return lambda params: model.logits(params, tokens), jax.eval_shape(model.init, jax.random.key(0))


def test_xla_counts_the_same_for_a_forward_pass(program):
    forward, params = program
    # This program computes every pair, the masked half too, and logits everywhere.
    expected = forward_flops(WIDE, ROWS * TOKENS, ROWS * TOKENS * TOKENS, ROWS * TOKENS)
    assert counted(forward, params) == pytest.approx(expected, rel=0.02)


def test_xla_counts_three_times_that_with_the_backward_pass(program):
    forward, params = program
    expected = 3 * forward_flops(WIDE, ROWS * TOKENS, ROWS * TOKENS * TOKENS, ROWS * TOKENS)
    # The loss is a product of logits, so that all of them have a gradient.
    assert counted(jax.grad(lambda params: jnp.sum(forward(params) ** 2)), params) == pytest.approx(expected, rel=0.02)
