"""How many responses are decoded at once: as many as fit, by the memory of the process that has least."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dgpo_jax import memory
from dgpo_jax.config import Config, RolloutConfig
from dgpo_jax.memory import Memory, choose_slots

GIB = 2**30


def device(process, limit, kind="NVIDIA H100"):
    """A GPU; limit in GiB, None = JAX does not tell, as of one that is only compiled for, and of another process's."""

    def stats():
        if process != jax.process_index() or limit is None:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: MemoryStats is only supported for addressable PjRt devices.")
        return {"bytes_limit": limit * GIB}

    return SimpleNamespace(platform="gpu", device_kind=kind, process_index=process, memory_stats=stats)


@pytest.fixture
def slots(monkeypatch):
    """The function (devices, process, what the others gather) -> slots, on two replicas, of responses of 1 GiB beside 11 GiB of weights."""
    need = Memory(state=8 * GIB, gradients=4 * GIB, decode=2 * GIB, reference=GIB, slot=GIB)
    monkeypatch.setattr(memory, "forecast_memory", lambda config, parts: need)

    def slots(devices, process=0, gather=lambda value: [value], **settings):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(memory.hosts, "gather", gather)
        shape = {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
        mesh = SimpleNamespace(devices=np.array(devices, object).reshape(2, 1, 1, 1), shape=shape)
        config = Config(rollout=RolloutConfig(prompts=128, group_size=8, **settings))
        return choose_slots(config, SimpleNamespace(mesh=mesh))

    return slots


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_asks_a_device_of_its_own_and_all_plan_with_the_least(process, slots):
    devices = [device(0, 70), device(1, 60)]

    def gather(value):
        assert value == (70, 60)[process] * GIB  # and not the 80 of the data sheet
        return [70 * GIB, 60 * GIB]

    assert slots(devices, process, gather) == 2 * 40  # 60 * 0.85 - 11 = 40 on each replica; with 70 they would be 48


def test_slots_that_are_given_are_taken_and_nobody_is_asked(slots):
    assert slots([device(0, 1)] * 2, gather=lambda value: pytest.fail("asked"), slots=96) == 96


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("NVIDIA H100", 2 * 56),  # 80 * 0.85 - 11 = 57, of which whole eights
        ("NVIDIA Unknown", 1024),  # all of them
    ],
)
def test_where_jax_does_not_tell_the_data_sheet_counts(kind, expected, slots):
    assert slots([device(1, None, kind)] * 2) == expected  # of a topology; here is none of its processes


def test_no_memory_for_a_single_response_is_refused(slots):
    with pytest.raises(ValueError, match=r"of 14\.0 GiB per device 11\.0 are taken"):
        slots([device(0, 14)] * 2)  # 14 * 0.85 - 11 = 0.9
