"""What a rollout keeps in a device's memory, and so how many responses can be decoded at once.

Known from shapes alone; activations are not counted, but by the margin.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dgpo_jax import hosts
from dgpo_jax.build import Actor, Parts
from dgpo_jax.config import Config
from dgpo_jax.hardware import device_chip
from dgpo_jax.models.parameters import parameter_count
from dgpo_jax.sharding import count_decoding

MARGIN = 0.15  # share of a device's memory that is left alone: prefill's activations, programs, fragmentation
LOGITS_HELD = 3  # f32[V] of every slot that sampling a token may hold at once
MULTIPLE = 8  # slots of a replica, where there are more


class Memory(NamedTuple):
    """Bytes on each device while responses are decoded."""

    state: float  # master weights and two moments, f32
    gradients: float  # their sum, f32: during updates only, but reserved throughout
    decode: float  # the weights once more, whole on every replica
    reference: float  # and those that a KL keeps the policy near
    slot: float  # cache and logits of a response


def forecast_memory(config: Config, parts: Actor | Parts) -> Memory:
    """What the config will take on the parts' mesh."""
    model, shape = parts.model.config, parts.mesh.shape
    weights, width = parameter_count(model), parts.model.compute_dtype.itemsize
    split = shape["fsdp"] * shape["tensor"]
    tokens = config.rollout.max_prompt + config.rollout.max_response
    per_head = model.head_width + 4 if config.rollout.int8_cache else width * model.head_width
    cache = 2 * model.layers * tokens * model.key_heads * per_head / shape["tensor"]
    return Memory(
        state=3 * 4 * weights / split,
        gradients=4 * weights / split,
        decode=(1 if config.rollout.int8_weights else width) * weights / shape["tensor"],
        reference=width * weights / split if config.kl.coefficient else 0.0,
        slot=cache + LOGITS_HELD * 4 * model.vocab_size / shape["tensor"],
    )


def device_memory(mesh: Mesh) -> float | None:
    """Bytes that each device may use: of the process that has least, the same on all; None where it is not known, as on a CPU.

    Every process must call it, in the same order among other collective calls.
    """
    devices = mesh.devices.flatten().tolist()
    if devices[0].platform == "cpu":
        return None
    # Only a process's own devices tell it; those of a topology, which are only compiled for, may all be of other processes.
    own = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
    known = [memory for memory in hosts.gather(_memory_of(own)) if memory is not None]
    return min(known, default=None)


def _memory_of(device: Any) -> float | None:
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a device of a topology
        stats = {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    chip = device_chip(device)
    return chip.memory if chip else None


def choose_slots(config: Config, parts: Actor | Parts) -> int:
    """Responses decoded at once, over all replicas: rollout.slots, or as many as fit; the same on every process, which all must call it.

    Raises:
        ValueError: not even one fits.
    """
    responses = config.rollout.prompts * config.rollout.group_size
    if config.rollout.slots:
        return min(config.rollout.slots, responses)
    capacity = device_memory(parts.mesh)
    if capacity is None:
        return responses
    need = forecast_memory(config, parts)
    taken = need.state + need.decode + need.reference
    each = int((capacity * (1 - MARGIN) - taken) // need.slot)
    if each < 1:
        raise ValueError(
            f"rollout.max_response is {config.rollout.max_response}, and no response of that length fits: of {capacity / 2**30:.1f} GiB per device"
            f" {taken / 2**30:.1f} are taken by weights and moments, and a slot needs {need.slot / 2**30:.2f}; raise mesh.fsdp or mesh.tensor, or"
            " lower rollout.max_response."
        )
    replicas = count_decoding(parts.mesh)
    return min(each // MULTIPLE * MULTIPLE or each, -(-responses // replicas)) * replicas
