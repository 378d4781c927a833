"""The matrix products of a layer, whose backward pass is written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.models.layers import product

CASES = [
    ("btd,df->btf", (2, 3, 4), (4, 8)),  # the output is larger than x
    ("btf,fd->btd", (2, 3, 8), (8, 4)),  # and smaller
    ("btd,dkmh->btkmh", (2, 3, 4), (4, 2, 3, 5)),  # several axes made
    ("btkmh,kmhd->btd", (2, 3, 2, 3, 5), (2, 3, 5, 4)),  # and taken
    ("btd,dkh->btkh", (2, 3, 12), (12, 2, 2)),  # several axes, and the output is smaller
]


def arrays(x_shape, kernel_shape):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, kernel_shape)]


@pytest.mark.parametrize("equation, x_shape, kernel_shape", CASES)
def test_the_gradient_of_a_product_is_that_of_its_einsum(equation, x_shape, kernel_shape):
    x, kernel = arrays(x_shape, kernel_shape)

    def gradient(multiply):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(multiply(equation, x, kernel))), argnums=(0, 1))(x, kernel)

    for ours, expected in zip(gradient(product), gradient(jnp.einsum), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation, x_shape, kernel_shape", CASES)
def test_what_is_transposed_for_the_gradient_of_the_kernel_is_the_smaller_array(equation, x_shape, kernel_shape):
    # It is the first operand of the product; on CPU it is copied.
    x, kernel = arrays(x_shape, kernel_shape)
    out, backward = jax.vjp(lambda *arguments: product(equation, *arguments), x, kernel)
    _, of_kernel = [step for step in jax.make_jaxpr(backward)(out).jaxpr.eqns if step.primitive.name == "dot_general"]
    assert of_kernel.params["dimension_numbers"][0] == ((0, 1), (0, 1))  # sums over all tokens
    sizes = [variable.aval.size for variable in of_kernel.invars]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]


def test_remat_of_all_but_matrix_products_keeps_the_product():
    x, kernel = arrays((2, 3, 4), (4, 8))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(jnp.sin(product("btd,df->btf", x, kernel))))

    kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    text = str(jax.make_jaxpr(jax.grad(kept, argnums=(0, 1)))(x, kernel))
    assert text.count("dot_general[") == 3  # forward, and two behind it; a fourth would be the product again
    assert str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(x, kernel)).count("dot_general[") == 4
