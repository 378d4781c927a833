"""How the time of an iteration grows with group size, response length, model size and devices.

    python benchmarks/growth.py [--rounds=5] [--axes=group,response,width,devices] [--plot=benchmarks/growth.png]

Takes about ten minutes on two CPU cores, most of it compiling. A whole GRPO iteration (sampling, rewards, one optimizer step) of the model of
tiny_model.py, 4 prompts x 8 responses of 64+64 tokens unless the axis says otherwise, lengths fixed. All sizes of an axis take
turns, one iteration each, so that whatever else the machine does slows all alike. Prints a table and writes a plot. Ratios and plot
are of processor time, all threads added up, which other work on the machine hardly changes.

Devices are fake ones that share this machine's cores: the same work, split and gathered. They show what that costs, and no
speedup; what real chips would take is in docs/dryrun.md.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tiny_model
from turns import HERE, Case, Round, Side, spread

BASE = Case("base", "iteration", prompts=4, samples=8, prompt_tokens=64, new_tokens=64)


class Point(NamedTuple):
    """One size on an axis."""

    value: int
    case: Case
    width: int = tiny_model.WIDTH
    devices: int = 1


AXES = {
    "group": ("samples per prompt, G", [Point(value, BASE._replace(samples=value)) for value in (2, 4, 8, 16, 32)]),
    "response": ("response tokens, R", [Point(value, BASE._replace(new_tokens=value)) for value in (16, 32, 64, 128, 256)]),
    "width": ("width of the model", [Point(value, BASE, width=value) for value in (128, 256, 512)]),
    "devices": ("fake devices on the same cores", [Point(value, BASE, devices=value) for value in (1, 2, 4)]),
}


def measure(points: list[Point], rounds: int) -> list[list[Round]]:
    """Rounds of every point, in turns; each in a process of its own."""
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides, cases = [], []
        for place, point in enumerate(points):
            environment = {
                "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={point.devices}",
            }  # fmt: skip
            side = stack.enter_context(Side(f"size {point.value}", sys.executable, "side_ours.py", environment))
            case = point.case._replace(name=str(place))
            side.prepare(case, tiny_model.write_folder(temporary / str(place), 0.0, width=point.width))
            sides.append(side)
            cases.append(case)
        results: list[list[Round]] = [[] for _ in points]
        for number in range(rounds):
            for place, (side, case) in enumerate(zip(sides, cases, strict=True)):
                results[place].append(side.round(case, number))
    return results


def growth(own: list[Round], first: list[Round]) -> list[float]:
    """Ratios of the processor time of rounds that ran one soon after the other."""
    return [one.processor / other.processor for one, other in zip(own, first, strict=True)]


def main(axes: list[str], rounds: int, plot: Path | None, smallest: int) -> None:
    """Measures the axes, prints a table of all, and plots them."""
    print("| axis | size | response tokens | seconds, median (lowest to highest) | processor seconds | to the smallest | tokens/s |\n|---|---|---|---|---|---|---|")
    curves = {}
    for axis in axes:
        label, points = AXES[axis]
        points = points[:smallest] if smallest else points
        results = measure(points, rounds)
        for point, own in zip(points, results, strict=True):
            ratio = statistics.median(growth(own, results[0]))
            print(
                f"| {label} | {point.value} | {own[0].tokens} | {spread([one.seconds for one in own])} |"
                f" {spread([one.processor for one in own])} | {ratio:.2f} |"
                f" {statistics.median(one.speed for one in own):.0f} |", flush=True,
            )  # fmt: skip
        curves[label] = ([point.value for point in points], [[one.processor for one in own] for own in results])
    if plot is not None:
        draw(curves, plot)


def draw(curves: dict, path: Path) -> None:
    """A panel for each axis: median and range on logarithmic scales, and what proportional growth would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3.2), squeeze=False, layout="constrained")
    for panel, (label, (values, seconds)) in zip(panels[0], curves.items(), strict=True):
        middle = [statistics.median(some) for some in seconds]
        low, high = ([abs(edge(some) - mid) for some, mid in zip(seconds, middle, strict=True)] for edge in (min, max))
        panel.errorbar(values, middle, yerr=[low, high], marker="o", capsize=3, label="measured")
        panel.plot(values, [middle[-1] * value / values[-1] for value in values], ":", color="gray", label="proportional")
        panel.set(xscale="log", yscale="log", xlabel=label, title="processor seconds per iteration" if panel is panels[0][0] else "")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--axes", default=",".join(AXES), help="by commas")
    parser.add_argument("--plot", default=str(HERE / "growth.png"), help="file; '' = none")
    parser.add_argument("--points", type=int, default=0, help="of each axis, its first; 0 = all")
    chosen = parser.parse_args()
    unknown = set(chosen.axes.split(",")) - set(AXES)
    if unknown:
        sys.exit(f"--axes: no axis {sorted(unknown)}; there are {', '.join(AXES)}")
    main(chosen.axes.split(","), chosen.rounds, Path(chosen.plot) if chosen.plot else None, chosen.points)
