"""What an iteration will call, known from the config alone: programs, how often each runs, and what lies beside them in memory.

Nothing of a run exists here, neither weights nor tokenizer nor problems: `Shapes` has the parts that programs are made
of, and their arguments are shapes. Lengths of prompts and responses are a guess of the caller's (`Lengths`).
"""

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from dgpo_jax.ahead import Program
from dgpo_jax.build import (
    abstract_state,
    build_programs,
    build_shardings,
    check_row_length,
    count_replicas,
    make_decode_params,
)
from dgpo_jax.compiling import rollout_programs, update_programs
from dgpo_jax.config import Config, ModelConfig
from dgpo_jax.models import Model, config_from_folder
from dgpo_jax.models.flops import rollout_flops, training_flops
from dgpo_jax.models.parameters import abstract_parameters, decays
from dgpo_jax.rl.drawing import Sampling
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.sampler import CHUNK, Sampler, make_sampler
from dgpo_jax.rl.update import Shardings
from dgpo_jax.sharding import make_mesh

SCORE_REFERENCE = "score the reference"  # as `compiling.update_programs` calls it
STOP_ID = 0  # any token will do where nothing is sampled


class Shapes(NamedTuple):
    """What programs are made of."""

    mesh: Mesh
    model: Model
    optimizer: optax.GradientTransformation
    shardings: Shardings
    sizes_from: str  # where the model's sizes were found

    @property
    def replicas(self) -> int:
        """Groups of devices that split the rows of a batch among them."""
        return count_replicas(self.mesh)


class Lengths(NamedTuple):
    """Tokens of the average prompt and response."""

    prompt: int
    response: int


class Step(NamedTuple):
    """A program, and how it will be run."""

    program: Program  # its `count` is calls per iteration
    trips: float = 1.0  # how often its loops run whose trip count is data
    attended: float = 1.0  # share of its scores that attention computes; see `hlo_kernels.kernel_costs`
    beside: tuple = ()  # trees of abstract arrays that are in memory meanwhile; those it takes as arguments may be among them


def build_shapes(config: Config, devices) -> Shapes:
    """The parts of a resolved config on these devices.

    Raises:
        ValueError: the devices do not fit the mesh, or the mesh the model or the batch.
    """
    check_row_length(config)
    mesh = make_mesh(**asdict(config.mesh), devices=devices)
    model_config, sizes_from = find_sizes(config.model)
    model = Model(model_config, mesh)
    optimizer = make_optimizer(config.optimizer, decays(model_config))
    return Shapes(mesh, model, optimizer, build_shardings(model, optimizer), sizes_from)


def find_sizes(model: ModelConfig) -> tuple[ModelConfig, str]:
    """(the model with the sizes of its folder, where they come from); the hub is not asked."""
    if not model.path:
        return model, "the config"
    if (Path(model.path) / "config.json").is_file():
        return replace(model, **config_from_folder(model.path)), f"{model.path}/config.json"
    return model, f"the config ({model.path} is not a folder here, and the hub was not asked)"


def plan_lengths(config: Config, prompt: int = 0, response: int = 0) -> Lengths:
    """The lengths to plan with; 0 = the longest allowed.

    Raises:
        ValueError: longer than that.
    """
    for flag, value, limit in (("prompt", prompt, config.rollout.max_prompt), ("response", response, config.rollout.max_response)):
        if not 0 <= value <= limit:
            raise ValueError(f"--mean-{flag} is {value}, but rollout.max_{flag} is {limit}; give 1 to {limit}, or 0 for that.")
    return Lengths(prompt or config.rollout.max_prompt, response or config.rollout.max_response)


def count_microbatches(config: Config, shapes: Shapes, lengths: Lengths) -> int:
    """Of one update, if every sequence has the average length."""
    update, rollout = config.update, config.rollout
    responses = rollout.prompts * rollout.group_size // update.updates
    in_a_row = max(1, update.tokens_per_row // (lengths.prompt + lengths.response))
    rows = update.rows_per_replica(shapes.mesh.shape["context"]) * shapes.replicas
    return math.ceil(math.ceil(responses / in_a_row) / rows)


def count_chunks(config: Config, shapes: Shapes, lengths: Lengths) -> int:
    """Of update.logprob_chunk slots, that hold the response tokens of a device's part of a microbatch."""
    update, context = config.update, shapes.mesh.shape["context"]
    in_a_row = max(1, update.tokens_per_row // (lengths.prompt + lengths.response))
    asked = update.rows_per_replica(context) * in_a_row * lengths.response / context
    return math.ceil(asked / min(update.logprob_chunk, update.tokens_per_device))


def update_steps(config: Config, shapes: Shapes, lengths: Lengths) -> list[Step]:
    """The programs of an iteration's updates."""
    updates, microbatches = config.update.updates, config.update.updates * count_microbatches(config, shapes, lengths)
    scored = (config.update.old_logprobs == "trainer") * microbatches
    calls = {
        "score": scored, "complete": scored, "zero": updates, "accumulate": microbatches, "norm": microbatches, "apply": updates,
        SCORE_REFERENCE: (config.kl.coefficient > 0) * microbatches,
    }  # fmt: skip
    programs = update_programs(config, shapes, build_programs(config, shapes))
    if SCORE_REFERENCE not in {program.name for program in programs}:
        calls["score"] += calls[SCORE_REFERENCE]  # the same program
    arguments = {program.name: program.arguments for program in programs}
    state, batch = arguments["apply"][0], arguments["accumulate"][2]
    # All batches of the iteration wait on the devices.
    reference = arguments[SCORE_REFERENCE][0] if SCORE_REFERENCE in arguments else abstract_reference(config, shapes)
    alive = (state, reference, *[batch] * microbatches)
    trips = count_chunks(config, shapes, lengths)
    length = lengths.prompt + lengths.response
    attended = max(1, config.update.tokens_per_row // length) * (length / config.update.tokens_per_row) ** 2
    return [Step(one._replace(count=calls[one.name]), trips, attended, alive) for one in programs if calls[one.name]]


def rollout_steps(config: Config, shapes: Shapes, lengths: Lengths, slots: int) -> list[Step]:
    """The programs of an iteration's rollout.

    Args:
        slots: responses decoded at once.
    """
    rollout, model = config.rollout, shapes.model
    sampling = Sampling(rollout.group_size, rollout.max_response, (STOP_ID,), STOP_ID, rollout.temperature, rollout.top_p, rollout.top_k)
    sampler = make_sampler(model, sampling, slots=slots, max_prompt=rollout.max_prompt)
    cast, *programs = rollout_programs(shapes, make_decode_params(shapes), {"": sampler})
    programs = [program for program in programs if program.name not in smaller_sizes(sampler)]
    state, reference = abstract_state(shapes), abstract_reference(config, shapes)
    weights = next(program.arguments[0] for program in programs if program.name == "prefill")
    leaves = jax.tree.leaves((state, reference, *(program.arguments for program in programs)))
    alive = tuple({id(leaf): leaf for leaf in leaves}.values())  # the programs share theirs
    before = (state, reference, weights)  # of `start`, which makes the slots
    return [Step(cast._replace(count=1), beside=(state.opt_state, reference))] + [
        Step(program._replace(count=calls), trips, attended, before if program.name == "start" else alive)
        for program in programs
        for calls, trips, attended in [planned_calls(program.name, sampler, config, lengths)]
    ]


def smaller_sizes(sampler: Sampler) -> set[str]:
    """Programs that decode fewer rows: they need no more than the largest, and run when few responses are left."""
    return {f"decode {rows}" for rows in sampler.sizes[1:]} | {"move"}


def planned_calls(name: str, sampler: Sampler, config: Config, lengths: Lengths) -> tuple[float, float, float]:
    """(calls per iteration, trips of loops whose number is data, share of scores attended) of a program of the sampler."""
    rollout = config.rollout
    responses = rollout.prompts * rollout.group_size / sampler.replicas  # of each replica
    if name == "prefill":
        return math.ceil(rollout.prompts / sampler.replicas / sampler.held), 1.0, (lengths.prompt / rollout.max_prompt) ** 2
    if name == "insert":
        return math.ceil(responses / sampler.rows), min(responses, sampler.rows), 1.0
    if not name.startswith("decode "):
        return 1, 1.0, 1.0
    # A slot that is free takes the next response, so that slots are full until none waits.
    steps = lengths.response * max(1.0, responses / sampler.rows)
    chunk = min(CHUNK, rollout.max_response)
    # Averaged over a response's life, half of it is there.
    filled = (lengths.prompt + lengths.response / 2) / (rollout.max_prompt + rollout.max_response)
    return steps / chunk, chunk, filled


def abstract_reference(config: Config, shapes: Shapes):
    """The weights that the run starts from, where a KL needs them; else None."""
    if not config.kl.coefficient:
        return None
    return abstract_parameters(shapes.model.config, shapes.mesh, shapes.model.compute_dtype)


def bytes_beside(step: Step) -> int:
    """What one device holds while the program runs, besides its arguments."""
    taken = Counter(id(leaf) for leaf in jax.tree.leaves(step.program.arguments))
    beside = Counter(id(leaf) for leaf in jax.tree.leaves(step.beside)) - taken
    sizes = {id(leaf): bytes_on_device(leaf) for leaf in jax.tree.leaves(step.beside)}
    return sum(count * sizes[name] for name, count in beside.items())


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one abstract array."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def model_flops(config: Config, shapes: Shapes, lengths: Lengths) -> dict[str, float]:
    """By phase, FLOPs that the model's formula asks for, of one iteration and all devices."""
    rollout = config.rollout
    prompts = [lengths.prompt] * rollout.prompts
    responses = [lengths.response] * (rollout.prompts * rollout.group_size)
    scorings = (config.update.old_logprobs == "trainer") + (config.kl.coefficient > 0)
    model = shapes.model.config
    return {
        "rollout": rollout_flops(model, prompts, responses),
        "update": training_flops(model, [lengths.prompt] * len(responses), responses, scorings),
    }
