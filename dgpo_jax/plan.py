"""The sizes that follow from a config, printed before anything is computed."""

import os
from pathlib import Path

import jax

from dgpo_jax import hosts
from dgpo_jax.build import Parts
from dgpo_jax.checkpoint.storage import describe_storage
from dgpo_jax.config import Config
from dgpo_jax.flags import VARIABLES
from dgpo_jax.memory import choose_slots, forecast_memory
from dgpo_jax.models.parameters import parameter_count
from dgpo_jax.recipe import PRESETS, ignored, method_settings, preset_choices
from dgpo_jax.session import say, say_prompt
from dgpo_jax.sharding import count_decoding
from dgpo_jax.workdir import forecast_storage


def print_plan(config: Config, parts: Parts, workdir: Path, chosen: dict[str, object]) -> None:
    """Prints the table and the first prompt as the model sees it.

    Args:
        chosen: settings left open in the config, with the values that the method was published with.
    """
    say(f"dgpo_jax: {config.name} in {workdir}")
    rows = plan(config, parts, workdir, chosen)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")
    say_prompt(parts.stream.take(0, 1)[0], parts.template, parts.tokenizer)


def plan(config: Config, parts: Parts, workdir: Path, chosen: dict[str, object]) -> list[tuple[str, str]]:
    """(name, value) of everything derived; sizes in tokens unless they say otherwise. Arguments as in `print_plan`."""
    rollout, update, model = config.rollout, config.update, parts.model.config
    responses = rollout.prompts * rollout.group_size
    rows = update.rows_per_replica(parts.mesh.shape["context"])
    weights = parameter_count(model)
    settings = ", ".join(f"{name} {value}" for name, value in method_settings(config).items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    dropped = f", {parts.dropped} dropped as longer than {rollout.max_prompt} tokens" if parts.dropped else ""
    benchmarks = "".join(f", {len(problems)} of {name}" for name, problems in parts.benchmarks.items())
    too_long = "".join(f", {count} of {name} too long to be asked: they count as wrong" for name, count in parts.unasked.items())
    too_long += "".join(f", {count} of {name} cut to {rollout.max_prompt} tokens" for name, count in parts.cut.items())
    slots = choose_slots(config, parts)
    turns = f", {slots} at a time" if slots < responses else ""
    device = parts.mesh.devices.flat[0]
    return [
        ("devices", f"{parts.mesh.size} x {device.device_kind} ({mesh})" + (f", of {hosts.count()} processes" if hosts.count() > 1 else "")),
        ("model", f"{weights / 1e6:.1f} M parameters, {model.layers} layers of width {model.width},"
                  f" computing in {parts.model.compute_dtype.name}"),
        ("problems", f"{len(parts.stream.problems)} to learn from{dropped}, {len(parts.held_out)} held out{benchmarks}{too_long}"),
        ("method", f"{config.loss.method} ({settings})" if settings else config.loss.method),
        ("recipe", recipe_line(config)),
        ("a reward", config.reward.functions),
        ("left open", ", ".join(f"{name} {value}" for name, value in chosen.items()) or "nothing"),
        *warnings(config, chosen),
        ("an iteration", f"{rollout.prompts} prompts x {rollout.group_size} samples = {responses} responses"
                         f" of up to {rollout.max_response}{turns}, then {update.updates} updates"),
        ("an update", f"{rollout.prompts // update.updates} groups = {responses // update.updates} responses"),
        ("a microbatch", f"{rows} rows of {update.tokens_per_row} on each of {parts.replicas} replicas"),
        ("the run", f"{config.sft.updates} supervised updates, then {config.iterations} iterations"),
        ("memory", memory_line(config, parts, slots)),
        ("checkpoints", f"every {config.checkpoint.every} iterations, {describe_storage(forecast_storage(config, parts, workdir))}"),
        ("compiler", compiler_line(device.platform)),
    ]  # fmt: skip


def warnings(config: Config, chosen: dict[str, object]) -> list[tuple[str, str]]:
    """What a user may not expect of the settings; as rows of the plan."""
    rows = []
    if config.loss.method in PRESETS:
        names = ", ".join(preset_choices(config, chosen)) or "nothing that the config does not say"
        rows.append(("preset", f"{config.loss.method} is more than its loss; it sets {names}"))
    if ignored(config):
        rows.append(("ignored", f"{', '.join(ignored(config))}, which {config.loss.method} does not read"))
    if config.kl.in_reward and config.loss.advantage == "grpo":
        rows.append((
            "warning", "dividing by a group's spread makes a small KL the whole advantage of a group that answers alike;"
            " consider loss.advantage=dr_grpo, or kl.place=loss",
        ))  # fmt: skip
    return rows


def recipe_line(config: Config) -> str:
    """What surrounds the method's rule: how advantages and the loss are formed, and whatever else is switched on."""
    loss, rollout, reward, kl, correction = config.loss, config.rollout, config.reward, config.kl, config.correction
    corrections = [name for name in (correction.weights, correction.reject) if name != "none"]
    switched_on = {
        f"dynamic sampling, at most {rollout.max_draws} draws": rollout.dynamic_sampling,
        f"{rollout.staleness} iterations stale": rollout.staleness,
        f"overlong penalty over the last {reward.overlong_buffer} tokens": reward.overlong_buffer,
        f"truncated responses: {reward.truncated}": reward.truncated != "keep",
        f"supervised {loss.supervised:g}": loss.supervised,
        f"entropy bonus {loss.entropy:g}": loss.entropy,
        f"KL {kl.estimator} {kl.coefficient:g} in the {kl.place}": kl.in_loss or kl.in_reward,
        f"sampler corrected by {' and '.join(corrections)}": corrections,
        f"old log-probabilities of the {config.update.old_logprobs}": config.update.old_logprobs != "trainer",
    }
    return ", ".join([f"{loss.advantage} advantages", loss.aggregation, *(text for text, on in switched_on.items() if on)])


def compiler_line(platform: str) -> str:
    """Where compiled programs are kept between runs, and the flags that XLA gets: ours (`flags.py`) and the user's."""
    cache = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    flags = os.environ.get(VARIABLES.get(platform, "XLA_FLAGS"), "").split()
    shown = " ".join(flag for flag in flags if not flag.startswith("--undefok"))
    return f"keeps programs in {cache or 'memory only'}, {shown or 'no flags'}"


def memory_line(config: Config, parts: Parts, slots: int) -> str:
    """What the large arrays take on one device, in GiB: a forecast of what is certain, activations not included.

    Args:
        slots: responses decoded at once, over all replicas.
    """
    need = forecast_memory(config, parts)
    sizes = {
        "training state": need.state + need.gradients,
        "decoding weights": need.decode,
        "cache and logits": need.slot * slots / count_decoding(parts.mesh),
        "reference": need.reference,
    }
    return "per device " + ", ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in sizes.items() if size)
