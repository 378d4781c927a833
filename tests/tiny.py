"""The tiny model that tests of `rl/` share, on one device or on meshes of the eight fake ones."""

import functools
import math

import jax
import numpy as np

from dgpo_jax.config import ModelConfig
from dgpo_jax.models import build
from dgpo_jax.models.parameters import parameter_shardings
from dgpo_jax.sharding import make_mesh, sharding_for, to_device

CONFIG = ModelConfig(
    vocab_size=64, layers=2, width=16, heads=4, key_heads=2, head_width=4, mlp_width=24, initializer_std=0.3,
    dtype="float32", remat="none",
)  # fmt: skip

# Name -> devices along data, fsdp and tensor.
MESHES = {"one device": (1, 1, 1), "data 8": (8, 1, 1), "fsdp 4 x tensor 2": (1, 4, 2)}


@functools.cache
def tiny_model(mesh_name="one device"):
    sizes = MESHES[mesh_name]
    return build(CONFIG, make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)]))


@functools.cache
def host_params():
    return jax.device_get(build(CONFIG).init(jax.random.key(0)))


@functools.cache
def tiny_params(mesh_name="one device"):
    """The same numbers on every mesh."""
    return to_device(host_params(), parameter_shardings(CONFIG, tiny_model(mesh_name).mesh))


def rows_sharding(model, *axes):
    """Of an array whose first axis is split over the replicas."""
    return sharding_for(model.mesh, ("batch", *axes))


def random_prompts(count, slots, seed=0):
    """Token lists of 1 to `slots` tokens, none of them 0."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, 1 + index % slots).tolist() for index in range(count)]
