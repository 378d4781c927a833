"""Compiles a run's programs for devices that need not be there, and says what they would take.

    python -m dgpo_jax.dryrun --config=configs/qwen_1p5b_v5e.py --topology=v5e:2x4
    python -m dgpo_jax.dryrun --config=configs/smoke.py --topology=cpu:8 --json

Neither weights nor tokenizer nor problems are read. Read `dryrun` from top to bottom; docs/dryrun.md says what the figures
mean and lists the keys of the JSON. Exit code 1 if the run would not fit into the devices' memory.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.config import Config
from dgpo_jax.costs import forecast, roofline
from dgpo_jax.costs.forecast import Lengths, Shapes, Step
from dgpo_jax.costs.hlo import parse
from dgpo_jax.costs.hlo_costs import Costs, costs
from dgpo_jax.costs.report import print_report
from dgpo_jax.costs.roofline import Memory, Refusal
from dgpo_jax.costs.topology import count_hosts, find_devices
from dgpo_jax.files import write_whole
from dgpo_jax.hardware import GIB, Chip, device_chip
from dgpo_jax.memory import choose_slots
from dgpo_jax.models.parameters import parameter_count
from dgpo_jax.recipe import resolve
from dgpo_jax.rules import require
from dgpo_jax.session import run_command

VERSION = 1  # of the JSON; it changes when a key changes its meaning or goes


@dataclass(frozen=True)
class Options:
    """Flags beside --config."""

    topology: str = ""  # devices to compile for: v5e:2x4 and other TPU slices, cpu:8, or gpu for those of this machine
    mean_prompt: int = 0  # tokens of the average prompt; 0 = rollout.max_prompt
    mean_response: int = 0  # tokens of the average response; 0 = rollout.max_response
    programs: str = ""  # only those whose names begin so, such as 'accumulate,decode 16'; '' = all
    json: str = ""  # file to write the figures to; - or nothing behind it = standard output, and no table


class Compiled(NamedTuple):
    """A program and what became of it."""

    step: Step
    seconds: float  # it took to compile
    memory: Memory | None  # None: too large to compile
    costs: Costs | None  # of one run on one device
    refusal: Refusal | None


class Outlook(NamedTuple):
    """All that a dry run finds out."""

    config: Config
    topology: str
    shapes: Shapes
    lengths: Lengths
    slots: int
    chip: Chip | None  # what one device has of it; None where it is not in the table
    capacity: float | None  # bytes
    programs: list[Compiled]
    partly: bool  # not all programs were asked for


def dryrun(config: Config, workdir: Path | None, options: Options) -> Outlook:
    """Compiles, reports, and refuses what does not fit.

    Raises:
        ValueError: a setting or the topology is wrong, or the run does not fit.
    """
    # Act 1, the plan: no device is touched, all there is are shapes.
    check_file(options.json)
    config, devices = resolve(config), find_devices(options.topology)
    shapes = forecast.build_shapes(config, devices)
    lengths = forecast.plan_lengths(config, options.mean_prompt, options.mean_response)
    slots = choose_slots(config, shapes)
    steps = forecast.rollout_steps(config, shapes, lengths, slots) + forecast.update_steps(config, shapes, lengths)

    # Act 2, the compiler.
    wanted = choose_programs(options.programs, [step.program.name for step in steps])
    platform = devices[0].platform
    compiled = [compile_step(step, platform) for step in steps if step.program.name.startswith(wanted)]

    # Act 3, the report.
    chip = device_chip(devices[0])
    outlook = Outlook(config, options.topology, shapes, lengths, slots, chip, roofline.capacity(devices[0], chip), compiled, wanted != ("",))
    figures = to_figures(outlook)
    if options.json == "-":
        print(json.dumps(figures, indent=2))
    else:
        print_report(figures, outlook.partly)
        if options.json:
            write_whole(Path(options.json), json.dumps(figures, indent=2) + "\n")
    if not figures["fits"]:
        raise ValueError(f"{config.name} does not fit {options.topology}: {figures['lacking'][0]}; {'; or '.join(figures['advice'])}.")
    return outlook


def check_file(path: str) -> None:
    """Raises ValueError for a --json that could not be written when all is compiled."""
    if path in ("", "-"):
        return
    require(not Path(path).is_dir(), "--json", path, "there is a folder of that name", "name a file")
    require(Path(path).absolute().parent.is_dir(), "--json", path, "there is no folder to write it to", "make that first")


def choose_programs(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Beginnings of the names of programs, by --programs; ("",) = all.

    Raises:
        ValueError: no name begins with one of them, and nothing would be found out.
    """
    if not text:
        return ("",)
    wanted = tuple(part.strip() for part in text.split(","))
    for part in wanted:
        require(
            bool(part) and any(name.startswith(part) for name in names), "--programs", text,
            f"no program's name begins with {part!r}", f"give beginnings of {', '.join(dict.fromkeys(names))}",
        )  # fmt: skip
    return wanted


def compile_step(step: Step, platform: str) -> Compiled:
    """Compiles one program; too large a one is an answer too.

    Args:
        platform: "cpu", "gpu" or "tpu".

    Raises:
        RuntimeError: the compiler refuses for another reason.
    """
    print(f"compiling {step.program.name}", end=" ", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        compiled, text = roofline.compile_with_text(step.program, platform)
    except RuntimeError as error:
        refusal = roofline.read_refusal(str(error))
        if refusal is None:
            raise
        compiled = None
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s", file=sys.stderr, flush=True)
    if compiled is None:
        return Compiled(step, seconds, None, None, refusal)
    memory = roofline.memory_of(compiled, forecast.bytes_beside(step))
    return Compiled(step, seconds, memory, costs(parse(text), unknown_trips=step.trips, attended=step.attended), None)


def to_figures(outlook: Outlook) -> dict:
    """The report as JSON; docs/dryrun.md says what the keys mean."""
    config, shapes, chip = outlook.config, outlook.shapes, outlook.chip
    programs = [program_figures(one, chip, outlook.capacity) for one in outlook.programs]
    lacking, advice = find_lacking(outlook)
    devices = shapes.mesh.devices.flatten().tolist()
    rollout, update = config.rollout, config.update
    return {
        "version": VERSION,
        "config": config.name,
        "topology": outlook.topology,
        "devices": len(devices),
        "hosts": count_hosts(devices),
        "chip": chip.name if chip else None,
        "capacity_bytes": outlook.capacity,
        "mesh": dict(shapes.mesh.shape),
        "parameters": parameter_count(shapes.model.config),
        "sizes_from": shapes.sizes_from,
        "plan": {
            "mean_prompt": outlook.lengths.prompt,
            "mean_response": outlook.lengths.response,
            "responses": rollout.prompts * rollout.group_size,
            "slots": outlook.slots,
            "updates": update.updates,
            "microbatches_per_update": forecast.count_microbatches(config, shapes, outlook.lengths),
        },
        "programs": programs,
        "fits": not lacking,
        "lacking": lacking,
        "advice": advice,
    } | speed_figures(outlook, programs)


def program_figures(one: Compiled, chip: Chip | None, capacity: float | None) -> dict:
    """Of one program, per device and run."""
    program = one.step.program
    figures = {"name": program.name, "phase": program.phase, "calls": program.count, "compile_seconds": round(one.seconds, 1)}
    if one.memory is None:
        return figures | {"fits": False, "needed_bytes": one.refusal.needed, "capacity_bytes": one.refusal.available}
    times = roofline.times_of(one.costs, chip) if chip else None
    return figures | {
        "fits": capacity is None or one.memory.total <= capacity,
        "memory_bytes": one.memory._asdict() | {"total": one.memory.total},
        "flops": one.costs.flops,
        "kernel_flops": one.costs.kernels,
        "accessed_bytes": one.costs.bytes,
        "collective_bytes": one.costs.collectives,
        "loops_of_unknown_length": one.costs.unknown_loops,
        "trips_assumed": one.step.trips,
        "seconds": times.seconds if times else None,
        "seconds_by": times._asdict() if times else None,
        "bound": times.bound if times else None,
    }


def speed_figures(outlook: Outlook, programs: Sequence[dict]) -> dict:
    """Of an iteration, as predicted; None where the chip is not in the table or a program is missing."""
    empty = {"phase_seconds": None, "iteration_seconds": None, "tokens_per_second_per_device": None, "mfu": None}
    if outlook.chip is None or outlook.partly or any(one.memory is None for one in outlook.programs):
        return empty
    phases = {"rollout": 0.0, "update": 0.0}
    for figures in programs:
        phases[figures["phase"]] += figures["calls"] * figures["seconds"]
    seconds, devices = sum(phases.values()), outlook.shapes.mesh.size
    needed = forecast.model_flops(outlook.config, outlook.shapes, outlook.lengths)
    done = {name: spent * devices * outlook.chip.flops for name, spent in phases.items()}
    rollout = outlook.config.rollout
    sampled = rollout.prompts * rollout.group_size * outlook.lengths.response
    return {
        "phase_seconds": phases,
        "iteration_seconds": seconds,
        "tokens_per_second_per_device": sampled / seconds / devices,
        "mfu": {name: needed[name] / done[name] for name in phases} | {"iteration": sum(needed.values()) / sum(done.values())},
    }


def find_lacking(outlook: Outlook) -> tuple[list[str], list[str]]:
    """(programs that do not fit and by how much, the worst first; what to change about the worst)."""
    found = []
    for one in outlook.programs:
        needed = one.memory.total if one.memory else one.refusal.needed
        available = outlook.capacity if one.memory else one.refusal.available
        if available is not None and needed > available:
            text = f"{one.step.program.name} needs {needed / GIB:.2f} GiB of {available / GIB:.2f} GiB, {(needed - available) / GIB:.2f} GiB too much"
            found.append((needed - available, text, one))
    found.sort(key=lambda entry: -entry[0])
    return [text for _, text, _ in found], advise(outlook, found[0][2]) if found else []


def advise(outlook: Outlook, one: Compiled) -> list[str]:
    """Settings that would make the program smaller, those that cost least first."""
    config, mesh = outlook.config, outlook.shapes.mesh.shape
    wider = f"raise mesh.fsdp (now {mesh['fsdp']}) on a larger slice"
    heads = outlook.shapes.model.config.key_heads
    split = [f"raise mesh.tensor (now {mesh['tensor']}, at most {heads})"] if mesh["tensor"] < heads else []
    if one.step.program.phase == "rollout":
        fewer = [f"lower rollout.slots (now {outlook.slots})"] if outlook.slots > outlook.shapes.mesh.size else []
        return [*fewer, *split, wider]
    update, advice = config.update, []
    if update.tokens_per_device > update.tokens_per_row:
        advice.append(f"lower update.tokens_per_device (now {update.tokens_per_device}, at least {update.tokens_per_row})")
    if config.model.remat in ("none", "dots"):
        advice.append(f"set model.remat=full (now {config.model.remat})")
    elif config.model.remat == "full":
        advice.append("set model.remat=offload")
    return [*advice, f"raise mesh.context (now {mesh['context']})", *split, wider]


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with a `--json` that has nothing behind it as `--json=-`."""
    following = [*arguments[1:], "--"]
    return [
        "--json=-" if argument == "--json" and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


if __name__ == "__main__":
    sys.argv[1:] = read_arguments(sys.argv[1:])
    run_command("dgpo_jax.dryrun", "Compiles a run's programs for devices that need not be there.", dryrun, Options)
