"""What the forward pass keeps for the backward pass: by `model.remat`, without a change to gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny import CONFIG, host_params

from dgpo_jax.models import attention as attention_module
from dgpo_jax.models import build

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 6)).astype(np.int32)


def gradient(remat, **changes):
    """Of the parameters, as a function."""
    model = build(replace(CONFIG, remat=remat, **changes))
    return jax.grad(lambda params: jnp.mean(jnp.square(model.logits(params, TOKENS))))


def test_offloading_does_not_change_gradients():
    ours, expected = (jax.jit(gradient(kind))(host_params()) for kind in ("offload", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)


def equations(jaxpr):
    """All equations, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(remat, **changes):
    return list(equations(jax.make_jaxpr(gradient(remat, **changes))(host_params()).jaxpr))


def test_offloading_sends_each_layer_s_input_to_the_host_and_nothing_else():
    def moved(remat):
        moves = [equation for equation in traced(remat) if equation.primitive.name == "device_put"]
        return [(equation.outvars[0].aval.shape, str(equation.params["devices"])) for equation in moves]

    def kinds(remat):
        return [(shape, "Host" in where or "pinned_host" in where) for shape, where in moved(remat)]

    layer_input = (*TOKENS.shape, CONFIG.width)
    assert sorted(kinds("offload")) == [(layer_input, False), (layer_input, True)]  # there, and back for the backward pass
    assert kinds("full") == []


@pytest.mark.parametrize("remat, calls", [
    ("full", 4),  # forward, forward again, gradient of the queries, of keys and values
    ("dots", 3),  # what the forward pass gave is kept
    ("none", 3),
])
def test_the_splash_kernel_runs_again_in_the_backward_pass_only_if_nothing_is_kept(monkeypatch, remat, calls):
    monkeypatch.setattr(attention_module, "platform_of", lambda mesh: "tpu")  # traced only: nothing runs
    kernels = [equation for equation in traced(remat, attention="splash") if equation.primitive.name == "pallas_call"]
    assert len(kernels) == calls
