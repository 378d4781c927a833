"""The figures of a comparison: means over seeds with their standard error, and what each method makes of a ratio.

Looks like the curves of a single run (`plots`). Never imports JAX.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgpo_jax import plots
from dgpo_jax.comparison import AVERAGE, ENTROPY, GRAD_NORM, GREEDY, Result, average_name, mean_and_error, series

# Told apart with colour-blind eyes too: hues far apart that also differ in lightness.
COLOURS = ("#2f6db3", "#e08a2e", "#1f8f6b", "#c23b45", "#7a5ea8", "#6b6b6b", "#4fb3d9", "#d77fb4", "#9a7b1c", "#143a5a")
LINES = ("-", "--", ":", "-.")  # the next where the colours begin again
DASH = 4.0  # line widths
SMALLEST = 1e-9  # stands for 0 where the axis is logarithmic: far below what is shown
RATIO = "ratio"  # a kind of panel beside those of plots: logarithmic from a factor of 2, as 1/2 is as far from 1 as 2

PANELS = {
    "accuracy": (
        plots.Panel("Held-out accuracy, greedy", "share right", (GREEDY,), kind="share"),
        plots.Panel("Held-out accuracy, {avg}", "share right", (AVERAGE,), kind="share"),
    ),
    "entropy": (plots.Panel("Entropy of the sampled tokens", "nats per token", (ENTROPY,), zero_based=True),),
    "grad_norm": (plots.Panel("Gradient norm", "before clipping, where not 0", (GRAD_NORM,), kind="log"),),
    "ratios": (
        plots.Panel("Largest ratio of an iteration", "new to old probability", ("policy/ratio_max",), kind=RATIO),
        plots.Panel("Smallest ratio of an iteration", "new to old probability", ("policy/ratio_min",), kind=RATIO),
    ),
}


class Weights(NamedTuple):
    """The gradient weights of one method over `ratios`."""

    label: str
    positive: Sequence[float]  # g where A > 0
    negative: Sequence[float]  # g where A < 0
    region: tuple[float, float] | None  # the ratios between which the method changes nothing


class Curve(NamedTuple):
    """A mean over seeds."""

    iterations: list[int]
    mean: list[float]
    low: list[float]  # one standard error below; the mean itself where there is one seed
    high: list[float]


def plot_comparison(results: Sequence[Result], folder: Path, title: str = "") -> list[Path]:
    """Draws accuracy.png, entropy.png, grad_norm.png, ratios.png, and all of them as overview.png; returns the paths.

    Curves are of the runs that finished.
    """
    everything = [panel for panels in PANELS.values() for panel in panels]
    figures = {**PANELS, "overview": everything}
    return [_plot(panels, results, folder / f"{name}.png", title) for name, panels in figures.items()]


def plot_weights(ratios: Sequence[float], weights: Sequence[Weights], path: Path) -> Path:
    """Draws the weight on A * grad log pi, and that on A * grad pi times pi_old, against the ratio; both axes logarithmic.

    The second is the first over the ratio, since grad pi = pi * grad log pi. The columns are the signs of A. Where a
    weight is 0 its line leaves the panel at the bottom. Grey lines: the trust region that most methods have.
    """
    figure, panels = _figure(2, 2, 11, 8.2)
    ratios = np.asarray(ratios)
    for column, (sign, field) in enumerate((("A > 0", "positive"), ("A < 0", "negative"))):
        on_log = np.array([getattr(curve, field) for curve in weights])
        for axes, what, values in zip(
            panels[:, column], ("∇ log π", "∇π, times π$_{old}$"), (on_log, on_log / ratios), strict=True
        ):
            _draw_weights(axes, ratios, values)
            _dress_weights(axes, f"Weight on {what}, {sign}", _common_region(weights))
    _legend_below(figure, [curve.label for curve in weights])
    return _save(figure, path)


def _draw_weights(axes: Any, ratios: np.ndarray, values: np.ndarray) -> None:
    """A line per row of `values`; where k lines coincide each is drawn for a k-th of the way, so that all are seen."""
    logs = np.log(np.maximum(values, SMALLEST))
    close = np.abs(logs[:, None] - logs[None]) < 0.01
    together = close[:, :, :-1] & close[:, :, 1:]  # bool[line, line, stretch between two ratios]
    for line in range(len(values)):
        count, rank = together[line].sum(axis=0), together[line, :line].sum(axis=0)
        changes = np.flatnonzero((np.diff(count) != 0) | (np.diff(rank) != 0)) + 1
        for begin, end in zip([0, *changes], [*changes, len(ratios) - 1], strict=True):
            k, r = count[begin], rank[begin]
            dashes = "-" if k == 1 else (DASH * (k - r), (DASH, DASH * (k - 1)))
            axes.plot(
                ratios[begin : end + 1], np.exp(logs[line, begin : end + 1]), color=_style(line)["color"],
                linestyle=dashes, linewidth=2.2, solid_capstyle="butt", dash_capstyle="butt",
            )  # fmt: skip


def _dress_weights(axes: Any, title: str, region: tuple[float, float] | None) -> None:
    plots.dress(axes, plots.Panel(title, "weight", ()), many=False, log=False)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.01, 100)
    axes.set_ylim(0.007, 140)
    axes.set_xlabel("ratio of new to old probability", color="#555555")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    for bound in region or ():
        if bound > 0:
            axes.axvline(bound, color="#888888", linewidth=0.8, zorder=0.5)


def _plain_numbers(axis: Any) -> None:
    """0.1 and 20 at the ticks of a logarithmic axis, not powers of ten."""
    low, high = axis.get_view_interval()
    digits = "25" if high < 100 * low else ""  # a short axis would else have one number, or none
    axis.set_tick_params(which="minor", colors="#555555")
    if digits:
        axis.grid(True, which="minor", color="#f2f2f2", linewidth=0.6)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")


def _common_region(weights: Sequence[Weights]) -> tuple[float, float] | None:
    """The region that most methods have, the first of several equally common ones."""
    regions = [curve.region for curve in weights if curve.region]
    return max(regions, key=regions.count, default=None)


def _plot(panels: Sequence[plots.Panel], results: Sequence[Result], path: Path, title: str) -> Path:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(rows, columns, 5.2 * columns + (2.0 if columns == 1 else 0.6), 3.9 * rows + 0.9)
    labels = list(dict.fromkeys(result.label for result in results))
    for at, panel in zip_longest(axes.flat, panels):
        if panel is None:
            at.set_axis_off()
        else:
            _draw(at, panel, results, labels)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    _legend_below(figure, labels)
    return _save(figure, path)


def _draw(axes: Any, panel: plots.Panel, results: Sequence[Result], labels: Sequence[str]) -> None:
    """One panel: a line per label, its standard error shaded."""
    (keys,) = panel.keys
    found = {
        label: [dict(series(result.rows, keys)) for result in results if result.label == label and result.finished]
        for label in labels
    }
    if panel.kind == "log":  # 0 is an iteration in which no group had an advantage: there was no gradient to measure
        found = {
            label: [{at: value for at, value in run.items() if value > 0} for run in runs] for label, runs in found.items()
        }
    values = [value for runs in found.values() for run in runs for value in run.values()]
    # Elsewhere a logarithm would hide zeros without a word.
    spread = max(values) / min(values) if values and min(values) > 0 else 0.0
    log = spread > {"log": 20, RATIO: 2}.get(panel.kind, math.inf)
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#999999")
    for number, label in enumerate(labels):
        curve = mean_curve(found[label], log, smooth=not keys.startswith("eval/"))
        marker = "o" if keys.startswith("eval/") or len(curve.iterations) < 3 else None
        axes.plot(curve.iterations, curve.mean, **_style(number), linewidth=1.8, marker=marker, markersize=3.5)
        axes.fill_between(
            curve.iterations, curve.low, curve.high, color=_style(number)["color"], alpha=0.15, linewidth=0
        )
    title = panel.title.format(avg=average_name(results))
    plots.dress(axes, panel._replace(title=title), many=False, log=log)
    if log:
        _plain_numbers(axes.yaxis)
    if panel.kind == "share" and values:
        # The whole range from 0 to 1 would press eight good methods into one line.
        low, high = min(values), max(values)
        axes.set_ylim(max(-0.02, low - 0.05), min(1.02, high + 0.05))


def mean_curve(runs: Sequence[Mapping[int, float]], log: bool, smooth: bool) -> Curve:
    """The mean over runs at each iteration that any of them has, and one standard error to both sides.

    Args:
        runs: iteration -> value of each run.
        log: average the logarithms: where values span decades, one run would otherwise be the mean. All must be > 0.
        smooth: take a running mean over a twentieth of a long run, as in the curves of a single one.
    """
    iterations = sorted({iteration for run in runs for iteration in run})
    forward, back = (math.log, math.exp) if log else (float, float)
    columns = [[forward(run[iteration]) for run in runs if iteration in run] for iteration in iterations]
    pairs = [mean_and_error(column) for column in columns]
    means, errors = [mean for mean, _ in pairs], [error or 0.0 for _, error in pairs]
    if smooth and len(iterations) >= plots.SMOOTH_FROM:
        means, errors = (plots.running_mean(values, len(iterations) // 40) for values in (means, errors))
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    return Curve(iterations, *[[back(value) for value in values] for values in (means, low, high)])


def _style(number: int) -> dict[str, str]:
    """Colour and line of the method with this number, the same in every figure."""
    colour, line = number % len(COLOURS), number // len(COLOURS)
    return {"color": COLOURS[colour], "linestyle": LINES[line % len(LINES)]}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend_below(figure: Any, labels: Sequence[str]) -> None:
    """One legend for all panels, under them, where it covers nothing."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_style(number), linewidth=2.2) for number in range(len(labels))]
    fitting = int(figure.get_size_inches()[0] / (0.6 + 0.085 * max(map(len, labels))))
    rows = math.ceil(len(labels) / max(1, fitting))
    columns = math.ceil(len(labels) / rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
