"""From a config to the parts of a run: mesh, tokenizer, problems, model, optimizer, weights.

Built in the order of what can go wrong cheaply: whatever a wrong setting can break is refused before the first weight
is read. Every refusal is a ValueError of one line.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgpo_jax import hosts
from dgpo_jax.config import Config, DataConfig, require
from dgpo_jax.data.benchmarks import HELD_OUT, parse_sets
from dgpo_jax.data.problems import ProblemStream, load_problems
from dgpo_jax.data.prompts import Fitted, Template, fit
from dgpo_jax.data.tokenizers import Tokenizer, load_tokenizer
from dgpo_jax.models import Model, config_from_folder, load_parameters, resolve_folder
from dgpo_jax.models.parameters import (
    abstract_parameters,
    decays,
    parameter_shardings,
    quantise_matrices,
    quantised_shardings,
)
from dgpo_jax.quantization import is_quantised
from dgpo_jax.recipe import method_settings
from dgpo_jax.rewards.checkers import Checkers, CodeSettings, MathSettings
from dgpo_jax.rl.correction import Correction
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.update import LossSettings, Programs, Shardings, make_programs
from dgpo_jax.sharding import DECODE_RULES, abstract, in_order, make_mesh, sharding_for
from dgpo_jax.types import Problem, TrainBatch, TrainState


class Actor(NamedTuple):
    """What answers problems, the weights apart."""

    mesh: Mesh
    folder: str  # with the pretrained weights; "" = random weights
    tokenizer: Tokenizer
    template: Template
    model: Model

    @property
    def replicas(self) -> int:
        """Groups of devices that split the rows of a batch among them."""
        return count_replicas(self.mesh)


class Parts(NamedTuple):
    """What a run is made of, the weights apart: an actor, and what it learns from and with."""

    mesh: Mesh
    folder: str
    tokenizer: Tokenizer
    template: Template
    model: Model
    stream: ProblemStream  # training problems in their shuffled order
    held_out: Sequence[Problem]  # empty = none
    benchmarks: dict[str, Sequence[Problem]]  # by name; evaluated in training besides held_out
    unasked: dict[str, int]  # problems of held_out and of benchmarks that are too long to be asked; they count as wrong
    dropped: int  # training problems left out because their prompts are too long
    cut: dict[str, int]  # problems asked without their beginning, for the same reason, by the name of their set
    optimizer: optax.GradientTransformation
    shardings: Shardings

    @property
    def replicas(self) -> int:
        """As in `Actor`."""
        return count_replicas(self.mesh)

    def problems(self) -> Iterator[Problem]:
        """All that there are, to learn from and to evaluate on."""
        return itertools.chain(self.stream.problems, self.held_out, *self.benchmarks.values())


def count_replicas(mesh: Mesh) -> int:
    """Groups of devices that split the rows of a batch among them."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def build_parts(config: Config) -> Parts:
    """Everything but the weights.

    Raises:
        ValueError: devices, tokenizer, problems or model do not fit the config or each other.
    """
    check_row_length(config)
    actor = build_actor(config)
    config.update.rows_per_replica(actor.mesh.shape["context"])
    check_cache(config, actor.mesh)
    problems = build_problems(config, actor.tokenizer, actor.template)
    optimizer = make_optimizer(config.optimizer, decays(actor.model.config))
    return Parts(*actor, *problems, optimizer, build_shardings(actor.model, optimizer))


def build_actor(config: Config) -> Actor:
    """Mesh, tokenizer, template and model.

    Raises:
        ValueError: devices, tokenizer or model do not fit the config or each other.
    """
    mesh = make_mesh(**asdict(config.mesh))
    model_config, folder = config.model, ""
    if model_config.path:
        folder = str(resolve_folder(model_config.path))
        model_config = replace(model_config, **config_from_folder(folder))
    model = Model(model_config, mesh)
    tokenizer = build_tokenizer(config, folder)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"model.vocab_size is {model_config.vocab_size}, but tokenizer {tokenizer.name!r} has {tokenizer.vocab_size}"
            " tokens; raise it, or name the model's own tokenizer in data.tokenizer."
        )
    template = Template(config.data.template, config.data.system, config.data.instruction)
    return Actor(mesh, folder, tokenizer, template, model)


def check_row_length(config: Config) -> None:
    """Refuses rows that a sequence may not fit into; who learns nothing needs none."""
    longest = config.rollout.max_prompt + config.rollout.max_response
    require(
        config.update.tokens_per_row >= longest, "update.tokens_per_row", config.update.tokens_per_row,
        f"a prompt and its response can be {longest} tokens and are never split", f"give at least {longest}",
    )  # fmt: skip


def check_cache(config: Config, mesh: Mesh) -> None:
    """Refuses what the platform would be slower and larger with."""
    require(
        not (config.rollout.int8_cache and mesh.devices.flat[0].platform == "tpu"), "rollout.int8_cache", True,
        "TPUs read the cache by kernels for bfloat16, and without these XLA copies it in every layer", "leave it off on TPUs",
    )  # fmt: skip


def build_tokenizer(config: Config, folder: str) -> Tokenizer:
    """The tokenizer that data.tokenizer names, or else the one in the model's folder."""
    name = config.data.tokenizer or folder
    if not name:
        raise ValueError("data.tokenizer is empty and so is model.path; name a folder, or builtin:words.")
    return load_tokenizer(name)


def build_problems(config: Config, tokenizer: Tokenizer, template: Template):
    """The fields of `Parts` from `stream` to `cut`."""
    data, limit = config.data, config.rollout.max_prompt

    def fitting(source: str, first: int | None = None) -> Fitted:
        problems = load(data, source, config.seed)
        return fit(problems[:first] if first else problems, tokenizer, template, limit, data.too_long)

    training = fitting(data.train)
    sources = dict(parse_sets(config.eval.sets)) | ({HELD_OUT: data.held_out} if data.held_out else {})
    sets = {name: fitting(source, config.eval.problems) for name, source in sources.items()}
    unasked = {name: fitted.dropped for name, fitted in sets.items() if fitted.dropped}
    cut = {name: fitted.cut for name, fitted in {"training": training, **sets}.items() if fitted.cut}
    benchmarks = {name: fitted.problems for name, fitted in sets.items()}
    held_out = benchmarks.pop(HELD_OUT, [])
    return ProblemStream(training.problems, config.seed), held_out, benchmarks, unasked, training.dropped, cut


def load(data: DataConfig, source: str, seed: int) -> Sequence[Problem]:
    """The problems of one source, with the settings of `data`."""
    return load_problems(
        source, size=data.size, seed=seed, low=data.low, high=data.high, operations=data.operations, slips=data.slips, unmarked=data.unmarked,
        problem_field=data.problem_field, answer_field=data.answer_field,
        data_dir=data.data_dir or None, manual_dir=data.manual_dir or None,
    )  # fmt: skip


def build_checkers(config: Config, problems: Iterable[Problem]) -> Checkers:
    """The processes that judge responses to problems of these kinds; a context manager."""
    math, code = config.reward, config.code
    return Checkers(
        MathSettings(math.extract, math.workers, math.deadline_s, math.memory_mb),
        CodeSettings(code.sandbox, code.workers, code.test_s, code.wall_s, code.memory_mb, code.max_tests),
        {problem.checker for problem in problems},
    )


def build_shardings(model: Model, optimizer: optax.GradientTransformation) -> Shardings:
    """Where state, batches and scalars live: moments like their parameters, rows over data and fsdp."""
    params = parameter_shardings(model.config, model.mesh)
    replicated = NamedSharding(model.mesh, PartitionSpec())
    moments = jax.eval_shape(optimizer.init, abstract_parameters(model.config))
    opt_state = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, moments, params, transform_non_params=lambda _: replicated
    )
    rows = sharding_for(model.mesh, ("batch", "tokens"))
    return Shardings(TrainState(replicated, params, opt_state), TrainBatch(*[rows] * len(TrainBatch._fields)), replicated)


def abstract_params(parts: Actor | Parts):
    """Shape, dtype and sharding of every weight, for reading a checkpoint."""
    return abstract_parameters(parts.model.config, parts.mesh)


def abstract_state(parts: Parts) -> TrainState:
    """Shape, dtype and sharding of every array of the state, for restoring a checkpoint."""
    params = abstract_params(parts)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(parts.optimizer.init, params))
    return abstract(shapes, parts.shardings.state)


def build_params(config: Config, parts: Actor | Parts):
    """Weights from model.path, or at random.

    Raises:
        ValueError: the folder's tensors are not those of the model.
    """
    if parts.folder:
        return load_parameters(parts.folder, parts.model.config, parts.mesh)
    return parts.model.init(jax.random.key(config.seed))


def build_state(config: Config, parts: Parts) -> TrainState:
    """The state before the first update: `build_params`, moments 0."""
    return fresh_state(parts, build_params(config, parts))


def fresh_state(parts: Parts, params) -> TrainState:
    """These weights with an optimizer that has seen nothing."""

    def start():
        return TrainState(
            jnp.int32(0), None, parts.optimizer.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
        )

    shapes = abstract_parameters(parts.model.config)
    state = jax.jit(start, out_shardings=parts.shardings.state._replace(params=None))()
    return state._replace(params=params)


def build_programs(config: Config, parts: Parts) -> Programs:
    """The programs of a policy update; the config is resolved."""
    loss = LossSettings(
        config.loss.method, method_settings(config), config.rollout.temperature, config.update.logprob_chunk,
        max_log_ratio=config.loss.max_log_ratio,
        kl=config.kl.coefficient if config.kl.in_loss else 0.0, kl_estimator=config.kl.estimator, entropy=config.loss.entropy,
        correction=Correction(**asdict(config.correction)),
    )  # fmt: skip
    return make_programs(parts.model, parts.optimizer, loss, parts.shardings)


def build_reference(parts: Parts, params):
    """A copy of these weights for forward passes only: in the compute dtype, laid out like the ones being trained."""
    return jax.jit(parts.model.cast, out_shardings=parts.shardings.state.params)(params)


class DecodeParams(NamedTuple):
    """Makes weights for decoding: cast, whole on every replica, and of this process's devices alone."""

    program: Any  # jitted params -> weights, over all devices
    shardings: Any  # of the results, over this process's

    def __call__(self, params):
        """Weights for the samplers."""
        return hosts.localise(self.program(params), self.shardings)


def make_decode_params(parts: Actor | Parts, int8: bool = False) -> DecodeParams:
    """What `DecodeParams` says, for this model and mesh.

    Args:
        int8: matrices in eight bits, all but the embedding table.
    """
    model = parts.model

    def quantised(params):
        matrices = quantise_matrices(model.config, params)
        return jax.tree.map(lambda leaf: leaf if is_quantised(leaf) else model.cast(leaf), matrices, is_leaf=is_quantised)

    def shardings(mesh: Mesh):
        return (quantised_shardings if int8 else parameter_shardings)(model.config, mesh, DECODE_RULES)

    program = in_order(jax.jit(quantised if int8 else model.cast, out_shardings=shardings(parts.mesh)))
    return DecodeParams(program, shardings(hosts.local_mesh(parts.mesh)))


def local_actor(parts: Actor | Parts) -> Actor:
    """The one that samples: on the devices of this process."""
    mesh = hosts.local_mesh(parts.mesh)
    return Actor(mesh, parts.folder, parts.tokenizer, parts.template, Model(parts.model.config, mesh))
