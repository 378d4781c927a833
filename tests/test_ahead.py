"""Compiling ahead: the calls that come later find the executable, and what does not compile is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from jax.sharding import NamedSharding, PartitionSpec

from dgpo_jax.ahead import Program, compile_ahead
from dgpo_jax.sharding import make_mesh, sharding_for, to_device


@pytest.fixture
def compiled():
    with compilations() as names:
        yield names


def step_on(mesh, name, rows):
    """A donating step on sharded trees, as an update is, and the arguments that it will be called with."""
    weights, batch = NamedSharding(mesh, PartitionSpec("fsdp")), sharding_for(mesh, ("batch", "tokens"))

    def step(state, x):
        moved = state["weights"] + jnp.sum(x) * state["count"]
        return {"weights": moved, "count": state["count"] + 1}, jnp.tanh(x)

    scalar = NamedSharding(mesh, PartitionSpec())
    shardings = {"weights": weights, "count": scalar}
    function = jax.jit(step, donate_argnums=0, out_shardings=(shardings, batch))
    abstract = (
        {"weights": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=weights), "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar)},
        jax.ShapeDtypeStruct((rows, 4), jnp.float32, sharding=batch),
    )

    def arguments():
        state = {"weights": np.ones((8, 4), np.float32), "count": np.int32(0)}
        return to_device(state, shardings), to_device(np.ones((rows, 4), np.float32), batch)

    return Program(name, "update", function, abstract), arguments


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1)], ids=["one device", "data 2 x fsdp 4"])
def test_a_call_after_compiling_ahead_compiles_nothing(sizes, compiled):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    programs, arguments = zip(*(step_on(mesh, f"step {rows}", rows) for rows in (8, 16, 24)), strict=True)
    finished = compile_ahead(programs, threads=2)
    assert sorted(name for name, _ in finished) == ["step 16", "step 24", "step 8"]
    assert len(compiled) == 3
    with jax.transfer_guard("disallow"):  # as the loop of `train` has it; part of no key that would miss
        for program, make in zip(programs, arguments, strict=True):
            state, x = make()
            for _ in range(2):  # the second call takes what the first gave
                state, x = program.function(state, x)
    assert len(compiled) == 3


def test_another_shape_does_compile_so_the_count_can_fail(compiled):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program, _ = step_on(mesh, "step", 8)
    _, other = step_on(mesh, "other", 32)
    compile_ahead([program])
    before = len(compiled)
    program.function(*other())
    assert len(compiled) > before


def test_every_program_is_reported_with_its_own_seconds():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    programs = [step_on(mesh, f"step {rows}", rows)[0] for rows in (3, 5)]
    lines = []
    finished = compile_ahead(programs, report=lambda name, spent: lines.append((name, spent)))
    assert lines == finished
    assert sorted(name for name, _ in finished) == ["step 3", "step 5"]
    assert all(spent > 0 for _, spent in finished)


def test_a_program_that_does_not_compile_is_named():
    def refuses(x):
        raise RuntimeError("RESOURCE_EXHAUSTED: 20 GiB of 16 GiB")

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    fine = Program("score", "update", jax.jit(jnp.tanh), (shape,))
    big = Program("update big", "update", jax.jit(refuses), (shape,))
    with pytest.raises(RuntimeError, match="program 'update big' does not compile: RESOURCE_EXHAUSTED"):
        compile_ahead([fine, big])


def test_no_programs_is_no_work():
    assert compile_ahead([]) == []
