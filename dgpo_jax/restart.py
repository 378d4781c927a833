"""Where a run stands between two iterations, as a checkpoint keeps it. `train` and `sft` write it, `train` goes on from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dgpo_jax import activity
from dgpo_jax.build import Parts, abstract_state
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.collecting import Backlog, nothing_drawn
from dgpo_jax.config import Config
from dgpo_jax.rl.experience import from_arrays, group_count, to_arrays
from dgpo_jax.types import TrainState


class Progress(NamedTuple):
    """All that a restart needs."""

    done: int  # iterations
    state: TrainState
    skipped: int  # updates skipped in a row
    backlog: Backlog
    unwritten: dict[str, Any] | None = None  # metrics of the last iteration, if its evaluation was not finished


def at_the_start(config: Config, state: TrainState) -> Progress:
    """Before the first iteration, with these weights."""
    return Progress(0, state, 0, nothing_drawn(config))


def save(checkpoints: Checkpoints, progress: Progress, record: Mapping[str, Any], score: float | None = None) -> None:
    """Writes it in the background; `restore` is the other way round.

    Args:
        record: of the run, from `workdir.run_record`.
        score: of its evaluation, by which the best are kept.
    """
    extra = {
        "skipped_in_a_row": progress.skipped, "position": progress.backlog.position, "unwritten": progress.unwritten,
        "run": dict(record),
    }  # fmt: skip
    waiting = progress.backlog.waiting
    arrays = to_arrays(waiting) if group_count(waiting) else None
    checkpoints.save(progress.done, progress.state, extra, arrays, score=score)


def restore(config: Config, parts: Parts, checkpoints: Checkpoints) -> Progress | None:
    """From the newest sound checkpoint; None if there is none.

    Raises:
        ValueError: it has other arrays than this run.
    """
    with activity.doing("reading the checkpoint"):
        restored = checkpoints.restore(abstract_state(parts))
    if restored is None:
        return None
    done, state, extra, arrays = restored
    waiting = from_arrays(arrays) if arrays else nothing_drawn(config).waiting
    return Progress(done, state, extra["skipped_in_a_row"], Backlog(extra["position"], waiting), extra.get("unwritten"))
