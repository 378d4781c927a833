"""The programs of a run, compiled before it begins: the updates that follow compile nothing."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from compilations import compilations
from tiny_config import get_config

from dgpo_jax import build, compiling
from dgpo_jax.ahead import Program
from dgpo_jax.compiling import MOST_AT_ONCE, compile_run, count_threads, rollout_programs, update_programs
from dgpo_jax.config import KlConfig, MeshConfig, ModelConfig
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.learning import learn
from dgpo_jax.recipe import resolve
from dgpo_jax.sharding import make_mesh
from dgpo_jax.types import Experience, Rollout


def config_for(**changes):
    """One layer, two groups of two, one update: little to compile."""
    config = get_config()
    model = ModelConfig(
        vocab_size=192, layers=1, width=16, heads=2, key_heads=2, head_width=8, mlp_width=16, remat="none", dtype=changes.pop("dtype", "float32")
    )
    return resolve(replace(
        config, model=model, rollout=replace(config.rollout, prompts=2, group_size=2), update=replace(config.update, updates=1),
        mesh=MeshConfig(data=1, fsdp=2), **changes,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """On two devices that share the weights, so that a layout could drift."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:2]))
        return build.build_parts(config_for())


def experience_of(config, parts):
    """Two groups, in each of which one response is right."""
    prompts = encode_prompts(parts.stream.take(0, 2), parts.tokenizer, parts.template, config.rollout.max_prompt)
    shape = (4, config.rollout.max_response)
    rollout = Rollout(np.full(shape, 5, np.int32), np.ones(shape, bool), np.full(shape, -3, np.float32), np.zeros(4, bool))
    scores = np.array([1, 0, 0, 1], np.float32)
    return Experience(prompts, rollout, np.full(shape, np.nan, np.float32), scores, scores, np.ones(2, np.int32))


def test_updates_after_compiling_the_listed_programs_compile_nothing(parts, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_A_LINE_S", 0.0)
    config = config_for()
    programs, decode_params = build.build_programs(config, parts), build.make_decode_params(parts)
    listed = [*rollout_programs(parts, decode_params, {}), *update_programs(config, parts, programs)]
    assert compile_run(parts, listed) > 0

    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["to compile, rollout: decode params", "to compile, update: accumulate, score, complete, zero, norm, apply"]
    assert sorted(line.split("  ")[1] for line in said[2:-1]) == sorted(program.name for program in listed)
    assert said[-1].startswith("compiled 7 programs in ")

    state = build.build_state(config, parts)
    jax.block_until_ready(state)
    with compilations() as seen, jax.transfer_guard("disallow"):
        jax.block_until_ready(decode_params(state.params))
        for iteration in (1, 2):  # the second on what the first gave
            state, metrics = learn(config, parts, programs, state, experience_of(config, parts), np.array([[1, -1], [-1, 1]], np.float32), iteration)
    assert seen == []
    assert metrics["policy/tokens"] == 4 * config.rollout.max_response  # they were real updates


@pytest.mark.parametrize("dtype, expected", [
    ("float32", 0),  # the reference is an argument like the policy: the same program scores both
    ("bfloat16", 1),
])
def test_a_reference_in_another_dtype_is_scored_by_a_program_of_its_own(parts, dtype, expected):
    config = config_for(kl=KlConfig(coefficient=0.1), dtype=dtype)
    parts = parts._replace(model=replace(parts.model, config=config.model))
    listed = update_programs(config, parts, build.build_programs(config, parts))
    of_reference = [program for program in listed if program.name == "score the reference"]
    assert len(of_reference) == expected
    for program in of_reference:
        assert {leaf.dtype.name for leaf in jax.tree.leaves(program.arguments[0])} == {"bfloat16"}


def test_the_programs_of_each_sampler_are_named_after_what_it_is_for(parts):
    given = []

    def sampler(*names):
        def programs(weights):
            given.append(weights)
            return [Program(name, "rollout", None, ()) for name in names]

        return SimpleNamespace(programs=programs)

    samplers = {"": sampler("prefill", "decode 4"), "greedy": sampler("prefill")}
    listed = rollout_programs(parts, build.make_decode_params(parts), samplers)
    assert [program.name for program in listed] == ["decode params", "prefill", "decode 4", "greedy prefill"]
    # They are asked with the weights as the first program gives them: whole on every replica.
    table = given[0]["embed"]["table"]
    assert table.dtype == "float32" and table.sharding.is_fully_replicated
    assert not listed[0].arguments[0]["embed"]["table"].sharding.is_fully_replicated


def test_several_compile_at_once_where_the_compiler_leaves_cores_idle(parts, monkeypatch):
    assert count_threads(parts) == 1  # XLA:CPU takes all cores for one program
    device = SimpleNamespace(platform="tpu")
    elsewhere = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([device], object)))
    for cores, expected in ((2, 2), (200, MOST_AT_ONCE), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert count_threads(elsewhere) == expected
