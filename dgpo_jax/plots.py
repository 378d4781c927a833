"""The curves of a run as one PNG, from metrics.jsonl alone. Never imports JAX."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dgpo_jax.metrics import read_metrics

COLOURS = ("#2f6db3", "#d9762b", "#3c9a5f", "#b5434a", "#7a5ea8", "#8a8a8a")
SMOOTH_FROM = 40  # iterations; a longer run gets a running mean over a twentieth of it, on top of its raw curve


class Panel(NamedTuple):
    """One set of axes; `keys` may be patterns, and those that are not in the run are left out."""

    title: str
    unit: str
    keys: tuple[str, ...]
    # "lines", "stacked" (areas that add up), "log" (logarithmic where that helps), or "share" (0 to 1 where all are)
    kind: str = "lines"
    zero_based: bool = False  # True: the axis starts at 0


PANELS = (
    Panel(
        "Reward and held-out accuracy",
        "mean per response",
        ("reward/mean", "eval/*avg@*[0-9]", "eval/*greedy"),
        kind="share",
    ),
    Panel("Response length", "tokens", ("rollout/response_length*", "eval/*length*"), zero_based=True),
    Panel("Entropy", "nats per token", ("policy/entropy",), zero_based=True),
    Panel("Distance from the sampling policy", "", ("policy/*kl*", "policy/ratio_max", "policy/clipped*"), kind="log"),
    Panel("Gradient norm", "before clipping", ("optim/grad_norm",), kind="log"),
    Panel(
        "Time per iteration",
        "seconds",
        ("time/rollout", "time/verify", "time/update", "time/eval"),
        kind="stacked",
    ),
)


def plot_curves(metrics_jsonl: str | Path, output_png: str | Path, title: str = "") -> None:
    """Draws reward, held-out accuracy, length, entropy, ratios, gradient norm and time per phase over iterations.

    Values that are missing or not finite leave a gap; a panel with no values says so; one iteration gives points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no display, no global state
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_jsonl)
    figure = Figure(figsize=(15, 8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        _draw(axes, panel, rows)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.savefig(output_png, dpi=110)


def _draw(axes: Any, panel: Panel, rows: list[dict]) -> None:
    """One panel with its curves, axes and legend."""
    keys = _present(panel.keys, rows)
    if not keys:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#999999")
    elif panel.kind == "stacked":
        _draw_stacked(axes, keys, rows)
    else:
        for key, colour in zip(keys, COLOURS * len(keys), strict=False):
            _draw_curve(axes, key, colour, rows)
    dress(axes, panel, many=len(keys) > 1, log=panel.kind == "log" and _spans_decades(keys, rows))


def _draw_curve(axes: Any, key: str, colour: str, rows: list[dict]) -> None:
    """A line; evaluations, which come every few iterations, as joined points."""
    iterations, values = _points(key, rows)
    sparse = key.startswith("eval/") or len(iterations) < 3
    if sparse or len(iterations) < SMOOTH_FROM:
        axes.plot(
            iterations, values, color=colour, linewidth=1.8, marker="o" if sparse else None, markersize=5, label=key
        )
        return
    axes.plot(iterations, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(iterations, running_mean(values, len(values) // 40), color=colour, linewidth=2.0, label=key)


def _draw_stacked(axes: Any, keys: list[str], rows: list[dict]) -> None:
    """Areas that add up; bars where there are too few iterations for an area."""
    iterations = [row["iteration"] for row in rows]
    layers = [[value if math.isfinite(value := row.get(key, 0.0)) else 0.0 for row in rows] for key in keys]
    if len(rows) >= 3:
        axes.stackplot(iterations, *layers, labels=keys, colors=COLOURS, alpha=0.85, linewidth=0)
        return
    bottom = [0.0] * len(rows)
    for key, layer, colour in zip(keys, layers, COLOURS, strict=False):
        axes.bar(iterations, layer, width=0.5, bottom=bottom, label=key, color=colour, alpha=0.85)
        bottom = [low + height for low, height in zip(bottom, layer, strict=True)]


def dress(axes: Any, panel: Panel, many: bool, log: bool) -> None:
    """Titles, grid, ticks and limits."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("iteration", color="#555555")
    axes.set_ylabel(panel.unit, color="#555555")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors="#555555")
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    if log:
        axes.set_yscale("log")
    elif panel.kind == "share" and low > -0.1 and high < 1.1:  # matplotlib's own margins included
        axes.set_ylim(0, 1.02)
    elif panel.zero_based or panel.kind == "stacked":
        # Room above for the legend, which would lie on the areas.
        axes.set_ylim(0, axes.get_ylim()[1] * (1.25 if panel.kind == "stacked" else 1.03))
    if many:
        place = {"loc": "upper left", "ncols": 3} if panel.kind == "stacked" else {"loc": "best"}
        axes.legend(frameon=False, fontsize=8.5, **place)


def _present(patterns: tuple[str, ...], rows: list[dict]) -> list[str]:
    """The keys that match and have a finite value somewhere, in the order of the patterns, each once."""
    known = dict.fromkeys(key for row in rows for key in row)
    matching = dict.fromkeys(key for pattern in patterns for key in known if fnmatchcase(key, pattern))
    return [key for key in matching if _points(key, rows)[0] and any(map(math.isfinite, _points(key, rows)[1]))]


def _points(key: str, rows: list[dict]) -> tuple[list[int], list[float]]:
    found = [(row["iteration"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [iteration for iteration, _ in found], [value for _, value in found]


def _spans_decades(keys: list[str], rows: list[dict]) -> bool:
    """Whether a logarithmic axis helps; never with zeros or negative values, which it hides without a word."""
    values = [value for key in keys for value in _points(key, rows)[1] if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the finite values among the `width` before and after each, so that the curve does not lag."""
    windows = [values[max(0, i - width) : i + width + 1] for i in range(len(values))]
    finite = [[value for value in window if math.isfinite(value)] for window in windows]
    return [sum(window) / len(window) if window else math.nan for window in finite]
