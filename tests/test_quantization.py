"""Eight bits: how far off they may be, and what is kept in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, host_params

from dgpo_jax.models.parameters import quantise_matrices, table
from dgpo_jax.quantization import cast, dequantise, is_quantised, quantise


def test_a_number_is_at_most_half_a_step_off_and_the_largest_exact():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    rounded = quantise(jnp.asarray(x), (1,))
    assert rounded.values.dtype == jnp.int8 and rounded.scale.shape == (5, 1, 3)
    error = np.abs(dequantise(rounded, jnp.float32) - x)
    assert (error <= 0.5001 * np.asarray(rounded.scale)).all() and error.max() > 0
    largest = np.abs(x).argmax(axis=1)
    np.testing.assert_allclose(np.take_along_axis(error, largest[:, None], axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-38, -3.0, 1e30])
def test_equal_numbers_come_back(value):
    x = jnp.full((2, 4), value, jnp.float32)
    np.testing.assert_allclose(dequantise(quantise(x, (1,)), jnp.float32), x, rtol=1e-6, atol=2e-38)  # not NaN where all are 0


def test_all_matrices_but_the_embedding_share_a_scale_along_what_they_sum_over():
    quantised = quantise_matrices(CONFIG, host_params())
    attention, mlp = quantised["layers"]["attention"], quantised["layers"]["mlp"]
    shapes = {
        "query": (2, 1, 2, 2, 4), "key": (2, 1, 2, 4), "value": (2, 1, 2, 4), "output": (2, 1, 1, 1, 16),
        "gate": (2, 1, 24), "up": (2, 1, 24), "down": (2, 1, 16),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert (attention | mlp)[name]["kernel"].scale.shape == shape
    rounded = [leaf for leaf in jax.tree.leaves(quantised, is_leaf=is_quantised) if is_quantised(leaf)]
    kernels = [name for name in table(CONFIG) if name.endswith("/kernel")]
    assert len(rounded) == len(kernels) and not is_quantised(quantised["embed"]["table"])


def test_casting_gives_the_matrices_back():
    params = host_params()
    back = cast(quantise_matrices(CONFIG, params), jnp.float32)
    for ours, exact in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, exact, atol=np.abs(exact).max() / 250)
