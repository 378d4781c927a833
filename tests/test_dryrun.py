"""The dry run: as a command on fake devices and for a TPU that is not there, and its sums by hand."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from dgpo_jax import dryrun
from dgpo_jax.config import Config, KlConfig, MeshConfig, ModelConfig, RolloutConfig, UpdateConfig, load
from dgpo_jax.costs import forecast, roofline
from dgpo_jax.costs.hlo import parse
from dgpo_jax.costs.hlo_costs import Costs, costs
from dgpo_jax.costs.topology import find_devices
from dgpo_jax.hardware import GIB, chip_of
from dgpo_jax.models.flops import forward_flops
from dgpo_jax.recipe import resolve

REPOSITORY = Path(__file__).parent.parent
TINY = "--config=tests/tiny_config.py"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler is not installed")


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "dgpo_jax.dryrun", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


def tiny(**changes) -> Config:
    return resolve(replace(base(), **changes))


@functools.cache
def base() -> Config:
    return load([f"--config={REPOSITORY}/tests/tiny_config.py"])


def test_the_command_compiles_for_fake_devices_and_writes_the_documented_keys():
    result = command(TINY, "--topology=cpu:4", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--mean-response=6", "--programs=insert,accumulate", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)  # nothing but JSON goes to standard output
    documented = (REPOSITORY / "docs" / "dryrun.md").read_text()
    for name in [*figures, *figures["plan"], *figures["programs"][0], *figures["programs"][0]["memory_bytes"]]:
        assert f"`{name}`" in documented, name
    assert figures["devices"] == 4 and figures["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert figures["plan"] == {
        "mean_prompt": 32, "mean_response": 6, "responses": 32, "slots": 32, "updates": 2, "microbatches_per_update": 1,
    }  # fmt: skip
    assert [program["name"] for program in figures["programs"]] == ["insert", "accumulate"]
    assert figures["fits"] is True and figures["chip"] is None and figures["iteration_seconds"] is None
    accumulate = figures["programs"][1]
    assert accumulate["memory_bytes"]["arguments"] > 0 and accumulate["flops"] > 0
    assert accumulate["collective_bytes"]["all-gather"] > 0  # the weights, over fsdp


@needs_libtpu
def test_the_command_compiles_for_a_tpu_that_is_not_there_and_refuses_what_does_not_fit_in_one_line(tmp_path):
    # 32768 slots of 8032 tokens, each 2 layers x 2 heads x 8 numbers x 2 x 2 bytes: 31 GiB at the least.
    result = command(
        TINY, "--topology=v5e:1x1", "--config.mesh.data=1", "--config.model.attention=chunked", "--config.model.dtype=auto",
        "--config.rollout.prompts=8192", "--config.rollout.max-response=8000", "--config.update.tokens-per-row=8192",
        "--config.update.tokens-per-device=8192", "--config.rollout.slots=32768", "--programs=insert,apply", f"--json={tmp_path}/figures.json",
    )  # fmt: skip
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    assert "tiny does not fit v5e:1x1" in errors[0] and "GiB too much" in errors[0] and "lower rollout.slots" in errors[0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["fits"] is False and figures["lacking"] and figures["chip"] == "TPU v5e"
    fitting = {program["name"]: program for program in figures["programs"] if program["fits"]}
    assert set(fitting) == {"apply"}  # only the rollout is too large
    assert fitting["apply"]["seconds"] == max(fitting["apply"]["seconds_by"].values()) > 0


@pytest.mark.parametrize("topology, complaint", [
    ("v5e:3x3", "choose one of v4:2x2x1"),  # no such slice: the list of those there are
    ("v9:2x2", "v9:2x2"),
    ("cpu:0", "cpu:N"),
    ("", "choose one of"),
])
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(topology, complaint):
    with pytest.raises(ValueError, match=complaint):
        find_devices(topology)


def test_a_gpu_that_is_not_there_is_said_so():
    with pytest.raises(ValueError, match="--topology is 'gpu', but JAX sees none"):
        find_devices("gpu")


def test_without_libtpu_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[dryrun\]'"):
        find_devices("v5e:2x2")


@pytest.mark.parametrize("programs", ["acumulate", "insert,acumulate", "insert,", ","])
def test_a_program_that_there_is_not_is_refused_with_those_that_there_are(programs):
    with pytest.raises(ValueError, match=r"--programs is .* no program's name begins with '(acumulate|)'; give beginnings of insert, accumulate\."):
        dryrun.choose_programs(programs, ["insert", "accumulate", "accumulate"])
    assert dryrun.choose_programs("accumulate, ins", ["insert", "accumulate"]) == ("accumulate", "ins")
    assert dryrun.choose_programs("", ["insert"]) == ("",)


@pytest.mark.parametrize("name, complaint", [("", "there is a folder of that name"), ("none/a.json", "no folder to write it to")])
def test_figures_that_could_not_be_written_are_refused_before_anything_is_compiled(tmp_path, name, complaint):
    with pytest.raises(ValueError, match=f"--json is .* {complaint}"):
        dryrun.dryrun(base(), None, dryrun.Options(topology="cpu:1", json=str(tmp_path / name)))


@pytest.mark.parametrize("arguments, expected", [
    (["--json"], ["--json=-"]),
    (["--json", "--topology=gpu"], ["--json=-", "--topology=gpu"]),
    (["--json", "file"], ["--json", "file"]),  # the next word is the file
    (["--json=file"], ["--json=file"]),
])
def test_json_without_a_file_means_standard_output(arguments, expected):
    assert dryrun.read_arguments(arguments) == expected


@pytest.mark.parametrize("message, needed, available", [
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries"
     " (149.06G) exceeds available HBM (15.75G). HLO module: jit__lambda.", 149.06, 15.75),
    ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.16G of 15.75G hbm. Exceeded hbm"
     " capacity by 4.41G.", 20.16, 15.75),
    ("Used 512.00M of 0.25G hbm", 0.5, 0.25),
])
def test_what_the_compiler_says_about_memory_is_read(message, needed, available):
    assert roofline.read_refusal(message) == pytest.approx((needed * GIB, available * GIB))


def test_another_complaint_of_the_compiler_is_not_about_memory():
    assert roofline.read_refusal("INVALID_ARGUMENT: 3G is not a shape") is None


def test_the_slowest_of_the_three_rates_bounds_a_program():
    chip = chip_of("TPU v5 lite")  # 197 TFLOP/s, 819 GB/s, 200 GB/s
    spent = Costs(products=100e12, kernels=97e12, bytes=81.9e9, collectives={"all-gather": 30e9, "all-reduce": 30e9})
    times = roofline.times_of(spent, chip)
    assert times == pytest.approx((1.0, 0.1, 0.3)) and times.bound == "flops" and times.seconds == times.flops
    slow = roofline.times_of(spent._replace(bytes=1638e9), chip)
    assert slow.bound == "memory" and slow.seconds == pytest.approx(2.0)
    assert roofline.times_of(spent._replace(collectives={"all-to-all": 500e9}), chip).bound == "links"


def test_memory_counts_donated_arguments_once_and_what_lies_beside():
    assert roofline.Memory(arguments=10, temporaries=5, outputs=4, aliased=3, code=1, beside=100).total == 117


def test_what_lies_beside_a_program_is_all_that_is_alive_but_its_own_arguments():
    config = tiny(mesh=MeshConfig(data=1, fsdp=8), kl=KlConfig(coefficient=0.1))
    shapes = forecast.build_shapes(config, jax.devices())
    steps = {step.program.name: step for step in forecast.update_steps(config, shapes, forecast.plan_lengths(config))}
    params = [forecast.bytes_on_device(leaf) for leaf in jax.tree.leaves(forecast.abstract_state(shapes).params)]
    batch = sum(forecast.bytes_on_device(leaf) for leaf in jax.tree.leaves(steps["score"].program.arguments[1]))
    waiting = 2 * batch  # an update of one microbatch each
    moments, counters, reference = 2 * sum(params), 4 + 4, sum(params)
    # accumulate takes weights, gradient and one batch; the moments, two counters, the reference and another batch wait.
    assert forecast.bytes_beside(steps["accumulate"]) == moments + counters + reference + waiting - batch
    # The batch that it takes is no copy: it is one of those that wait.
    assert forecast.bytes_beside(steps["score"]) == forecast.bytes_beside(steps["accumulate"])
    # apply takes the state and the gradient.
    assert forecast.bytes_beside(steps["apply"]) == reference + waiting
    assert steps["score"].program.count == 2 * 2  # in float32 the reference is scored by the same program


def test_attention_is_counted_by_how_much_of_its_scores_the_lengths_fill():
    config = tiny(mesh=MeshConfig(data=1))
    shapes = forecast.build_shapes(config, jax.devices()[:1])
    lengths = forecast.Lengths(prompt=16, response=4)
    steps = [*forecast.rollout_steps(config, shapes, lengths, 8), *forecast.update_steps(config, shapes, lengths)]
    attended = {step.program.name: step.attended for step in steps}
    assert attended["prefill"] == 0.5**2  # 16 of 32 slots, of queries and of keys
    assert attended["decode 8"] == (16 + 2) / 44  # a prompt and, on average, half of its response
    assert attended["accumulate"] == attended["score"] == 3 * (20 / 64) ** 2  # three sequences in a row of 64


def test_slots_lie_beside_a_prefill_but_not_beside_the_program_that_makes_them():
    config = tiny(mesh=MeshConfig(data=1))
    shapes = forecast.build_shapes(config, jax.devices()[:1])
    steps = {step.program.name: step for step in forecast.rollout_steps(config, shapes, forecast.plan_lengths(config), 8)}

    def size(tree):
        return sum(map(forecast.bytes_on_device, jax.tree.leaves(tree)))

    weights, slots, _ = steps["decode 8"].program.arguments
    state = size(forecast.abstract_state(shapes))
    assert forecast.bytes_beside(steps["start"]) == state + size(weights)
    assert forecast.bytes_beside(steps["prefill"]) >= state + size(slots)


@pytest.mark.parametrize("lengths, microbatches", [
    ((32, 12), 4),  # 128 responses of 44, one to a row of 64; a microbatch has 4 rows on each of 8 devices
    ((16, 16), 2),  # two to a row
    ((16, 17), 4),  # 33 do not fit twice
    ((4, 4), 1),
])
def test_microbatches_follow_from_how_many_sequences_fit_a_row(lengths, microbatches):
    config = tiny(rollout=RolloutConfig(prompts=64, group_size=4, max_prompt=32, max_response=32), mesh=MeshConfig(data=8))
    shapes = forecast.build_shapes(config, jax.devices())
    assert forecast.count_microbatches(config, shapes, forecast.Lengths(*lengths)) == microbatches


@pytest.mark.parametrize("slots, mean, expected", [
    (32, 12, 12),  # all at once: as many steps as a response has tokens
    (8, 12, 48),  # four responses follow each other in a slot
    (8, 6, 24),  # half as long
])
def test_decoding_takes_as_many_steps_as_its_slots_need(slots, mean, expected):
    rollout = replace(tiny().rollout, max_response=256)  # long enough for the sampler to have smaller sizes too
    config = tiny(mesh=MeshConfig(data=1), rollout=rollout, update=UpdateConfig(tokens_per_row=512, tokens_per_device=512))
    shapes = forecast.build_shapes(config, jax.devices()[:1])
    steps = forecast.rollout_steps(config, shapes, forecast.plan_lengths(config, 0, mean), slots)
    decode = next(step for step in steps if step.program.name.startswith("decode ") and step.program.name != "decode params")
    assert decode.program.count * decode.trips == expected
    names = [step.program.name for step in steps]
    assert {"decode params", "prefill", "insert", f"decode {slots}"} <= set(names)
    assert sum(name.startswith("decode ") for name in names) == 2  # the weights', and one size: smaller ones need less


@pytest.mark.parametrize("prompt, response, complaint", [
    (33, 0, "--mean-prompt is 33, but rollout.max_prompt is 32"),
    (0, 13, "--mean-response is 13, but rollout.max_response is 12"),
    (0, -1, "--mean-response is -1"),
])
def test_a_length_that_cannot_be_is_refused(prompt, response, complaint):
    with pytest.raises(ValueError, match=complaint):
        forecast.plan_lengths(tiny(), prompt, response)


def test_sizes_come_from_a_local_folder_and_else_from_the_config(tmp_path):
    hub = ModelConfig(path="somebody/model", width=64)
    assert forecast.find_sizes(hub)[0] == hub and "the hub was not asked" in forecast.find_sizes(hub)[1]
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "num_hidden_layers": 3, "hidden_size": 48,
        "num_attention_heads": 4, "intermediate_size": 96,
    }))  # fmt: skip
    model, where = forecast.find_sizes(ModelConfig(path=str(tmp_path)))
    assert (model.layers, model.width, model.vocab_size) == (3, 48, 100) and where == f"{tmp_path}/config.json"


def test_an_update_costs_what_the_formula_says():
    config = tiny(mesh=MeshConfig(data=1), update=UpdateConfig(updates=2, tokens_per_row=64, tokens_per_device=128, logprob_chunk=64))
    shapes = forecast.build_shapes(config, jax.devices()[:1])
    steps = {step.program.name: step.program for step in forecast.update_steps(config, shapes, forecast.plan_lengths(config))}
    text = steps["accumulate"].function.lower(*steps["accumulate"].arguments).compile().as_text()
    tokens, pairs = 2 * 64, 2 * 64 * 64  # plain attention computes the masked half too
    layers = forward_flops(config.model, tokens, pairs, 0)
    chunks = forecast.count_chunks(config, shapes, forecast.Lengths(32, 12))
    assert chunks == 1  # two rows of one response of 12 tokens: 24 of the 64 slots of a chunk
    logits = forward_flops(config.model, 0, 0, 64)
    # Forward once and backward twice; the logits once more, since they are not kept.
    assert costs(parse(text), unknown_trips=chunks).products == 3 * layers + 4 * logits
    assert costs(parse(text), unknown_trips=2).products == 3 * layers + 4 * 2 * logits


def outlook(remat="full", tokens_per_device=256, phase="update", slots=32, tensor=1):
    config = tiny(model=replace(tiny().model, remat=remat), update=replace(tiny().update, tokens_per_device=tokens_per_device))
    program = SimpleNamespace(name="accumulate", phase=phase)
    one = SimpleNamespace(step=SimpleNamespace(program=program), memory=roofline.Memory(20 * GIB, 0, 0, 0, 0, 0), refusal=None)
    shapes = SimpleNamespace(mesh=SimpleNamespace(shape={"fsdp": 8, "context": 1, "tensor": tensor}, size=8), model=SimpleNamespace(config=config.model))
    return SimpleNamespace(config=config, shapes=shapes, slots=slots, capacity=15.75 * GIB, programs=[one])


@pytest.mark.parametrize("settings, first", [
    ({}, "lower update.tokens_per_device (now 256, at least 64)"),
    ({"tokens_per_device": 64}, "set model.remat=offload"),  # already one row
    ({"tokens_per_device": 64, "remat": "none"}, "set model.remat=full (now none)"),
    ({"tokens_per_device": 64, "remat": "offload"}, "raise mesh.context (now 1)"),
    ({"phase": "rollout"}, "lower rollout.slots (now 32)"),
    ({"phase": "rollout", "slots": 8}, "raise mesh.tensor (now 1, at most 2)"),  # one a device already
    ({"phase": "rollout", "slots": 8, "tensor": 2}, "raise mesh.fsdp (now 8) on a larger slice"),
])
def test_what_to_change_names_the_cheapest_setting_that_is_left(settings, first):
    lacking, advice = dryrun.find_lacking(outlook(**settings))
    assert lacking == ["accumulate needs 20.00 GiB of 15.75 GiB, 4.25 GiB too much"]
    assert advice[0] == first
