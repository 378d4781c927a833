"""What a run keeps of itself: when it is saved, which saves count as best, and what becomes of updates that are not finite."""

import math
from pathlib import Path
from typing import Any

from dgpo_jax import hosts
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import CheckpointConfig, Config
from dgpo_jax.metrics import read_metrics, write_lines
from dgpo_jax.restart import Progress
from dgpo_jax.rules import require
from dgpo_jax.session import say


def needs_saving(config: Config, checkpoints: Checkpoints, now: Progress, saved: Progress, score: float | None) -> bool:
    """Whether a checkpoint is due, or the last one came to nothing, or this one would be the best.

    Not while updates are being skipped: these change nothing, and weights that have gone wrong must not displace good ones.

    Args:
        saved: what the newest checkpoint holds.
        score: of the iteration's evaluation.
    """
    every = config.checkpoint.every
    if now.done == config.iterations:
        return True
    if now.skipped:
        return False
    if now.done % every == 0 or now.done - saved.done >= every:
        return True
    if any(hosts.gather(checkpoints.failure is not None)):
        return True
    best = checkpoints.best_score() if score is not None and config.checkpoint.keep_best else math.inf
    return hosts.from_first(lambda: best is None or (score is not None and score > best))


def best_score(config: Config, metrics: dict[str, Any]) -> float | None:
    """By which the best checkpoints are kept; None where nothing was evaluated."""
    default = f"eval/avg@{config.eval.samples}" if config.eval.samples else "eval/greedy"
    return metrics.get(config.checkpoint.best_by or default)


def check_best_by(settings: CheckpointConfig, checkpoints: Checkpoints, done: int, metrics: dict[str, Any]) -> None:
    """Refuses a best_by that an evaluation lacks: no best checkpoint would ever be kept.

    A metric of iterations is looked for after the first one, and no more once a checkpoint has been kept for it.

    Args:
        done: iterations.
        metrics: of the iteration and its evaluation.
    Raises:
        ValueError: with the names that there are.
    """
    if not (settings.best_by and settings.keep_best):
        return
    best = checkpoints.best_score()

    def on_first() -> None:
        names = [name for name in metrics if name.startswith("eval/") and not name.endswith("_length")]
        due = settings.best_by.startswith("eval/") or (done and best is None)
        require(
            not names or not due or settings.best_by in metrics, "checkpoint.best_by", settings.best_by,
            "this run has no such metric", f"choose one of {', '.join(names)}",
        )  # fmt: skip

    hosts.from_first(on_first)


def report_skipped(workdir: Path, iteration: int, rows: list[dict]) -> None:
    """Writes down what was in the updates that were skipped, so that somebody can look at it."""
    path = workdir / "nonfinite" / f"iteration_{iteration:06d}.jsonl"
    say(f"warning: updates of iteration {iteration} were skipped, for something in them was not finite; their sequences are in {path}")
    if hosts.is_first():
        earlier = read_metrics(path) if path.exists() else []  # from before a stop amid the iteration's updates
        write_lines(path, [row for row in earlier if row["update"] < rows[0]["update"]] + rows)


def check_skipped(most: int, skipped: int, workdir: Path) -> None:
    """Ends the run when `most` updates in a row were skipped, before its state is saved: the newest checkpoint is from before them.

    Raises:
        ValueError: with what happened.
    """
    if skipped >= most:
        rows = workdir / "nonfinite"
        look = f"Look at {rows}, or lower" if rows.exists() else "Lower"  # a sampler that overflows gives no sequence to look at
        raise ValueError(
            f"{skipped} updates in a row had a gradient, a loss or a log-probability that is not finite, and optimizer.max_skipped is"
            f" {most}; the newest checkpoint is from before them. {look} optimizer.learning_rate and give"
            " checkpoint.accept_changes=optimizer.learning_rate."
        )
