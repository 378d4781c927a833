"""Checkpoints that are whole or are not read. `saving` has the whole story, `folders` what is on the disk."""

from dgpo_jax.checkpoint.arrays import read_params
from dgpo_jax.checkpoint.folders import locate, peek
from dgpo_jax.checkpoint.saving import Checkpoints, Restored

__all__ = ["Checkpoints", "Restored", "locate", "peek", "read_params"]
