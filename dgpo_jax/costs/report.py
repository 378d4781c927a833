"""The figures of a dry run as a table."""

from collections.abc import Sequence

from dgpo_jax.hardware import GIB

UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10, "B": 1}
PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}


def print_report(figures: dict, partly: bool) -> None:
    """The figures for a person.

    Args:
        figures: as `dryrun.to_figures` gives them.
        partly: not all programs were asked for.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    capacity = f", {in_memory(figures['capacity_bytes'])} each for programs" if figures["capacity_bytes"] else ""
    plan = figures["plan"]
    print(f"{figures['config']} on {figures['topology']}: {figures['devices']} x {figures['chip'] or 'device'} ({mesh}){capacity}")
    if figures["hosts"] > 1:
        print(f"  {figures['hosts']} hosts: the trainer drives one, so this is a forecast for a later release")
    print(f"  {figures['parameters'] / 1e9:.2f} G parameters, sizes from {figures['sizes_from']}")
    print(
        f"  an iteration: {plan['responses']} responses of {plan['mean_response']} tokens to prompts of {plan['mean_prompt']},"
        f" {plan['slots']} at once; {plan['updates']} updates of {plan['microbatches_per_update']} microbatches\n"
    )
    rows = [("program", "calls", "arguments", "temporaries", "outputs", "beside", "total", "FLOP", "accessed", "links", "time", "bound by")]
    rows += [table_row(program) for program in figures["programs"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))))
    print_collectives(figures["programs"])
    if figures["iteration_seconds"] is not None:
        phases, mfu = figures["phase_seconds"], figures["mfu"]
        print(
            f"\n  at least {amount(figures['iteration_seconds'], 's')} an iteration: rollout {amount(phases['rollout'], 's')},"
            f" updates {amount(phases['update'], 's')};\n  at most {figures['tokens_per_second_per_device']:.0f} sampled tokens/s per device,"
            f" MFU {mfu['iteration']:.1%} (rollout {mfu['rollout']:.1%}, updates {mfu['update']:.1%})"
        )
    if figures["fits"] and figures["capacity_bytes"]:
        print("  these fit" if partly else "  it fits")


def table_row(program: dict) -> tuple[str, ...]:
    """One line of the table; per device and call."""
    name, calls = program["name"], f"{program['calls']:g}"
    if "memory_bytes" not in program:
        return (name, calls, "", "", "", "", in_memory(program["needed_bytes"]), "", "", "", "", "too large")
    memory, links = program["memory_bytes"], sum(program["collective_bytes"].values())
    new = memory | {"outputs": memory["outputs"] - memory["aliased"]}  # those in the place of arguments are counted there
    sizes = [in_memory(new[part]) for part in ("arguments", "temporaries", "outputs", "beside", "total")]
    spent = [amount(program["flops"]), amount(program["accessed_bytes"], "B"), amount(links, "B")]
    seconds = "" if program["seconds"] is None else amount(program["seconds"], "s")
    return (name, calls, *sizes, *spent, seconds, program["bound"] or "")


def in_memory(size: float) -> str:
    """Bytes in powers of 1024: 1.50 GiB."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:.2f} {unit}" if unit != "B" else f"{size:.0f} B"


def amount(value: float, unit: str = "") -> str:
    """With a prefix in powers of 1000: 1.50 T, 20.0 ms."""
    prefix = next((prefix for prefix, size in PREFIXES.items() if value >= size), "")
    return f"{value / PREFIXES[prefix]:.3g} {prefix}{unit}".rstrip() if value else "0"


def print_collectives(programs: Sequence[dict]) -> None:
    """What goes over the links, by kind."""
    for program in programs:
        kinds = {kind: size for kind, size in program.get("collective_bytes", {}).items() if size >= 1e6}
        if kinds:
            listed = ", ".join(f"{kind} {amount(size, 'B')}" for kind, size in sorted(kinds.items(), key=lambda entry: -entry[1]))
            print(f"  {program['name']}: {listed}")
