"""Where a run stands, as a checkpoint keeps it: between two iterations, or amid the updates of one.

A checkpoint amid updates, which only a stop leaves, has the number of their iteration: the whole iteration's will take its
place, and the one before, which may be the best, keeps its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dgpo_jax import activity
from dgpo_jax.build import Parts, abstract_state
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.collecting import Backlog, Collected, nothing_drawn
from dgpo_jax.config import Config, changed_settings
from dgpo_jax.rl.experience import from_arrays, group_count, group_size, to_arrays
from dgpo_jax.rl.update import StepFigures, Totals
from dgpo_jax.session import say
from dgpo_jax.types import Experience, TrainState


class Progress(NamedTuple):
    """All that a restart needs."""

    done: int  # iterations
    state: TrainState
    skipped: int  # updates skipped in a row
    backlog: Backlog
    unwritten: dict[str, Any] | None = None  # metrics of the last iteration, if its evaluation was not finished
    collected: Collected | None = None  # of the next iteration, if its updates have begun; `state` and `backlog` are then amid it

    @property
    def next_line(self) -> int:
        """The first iteration whose line of metrics is yet to be written; 0 is that of the evaluation before any update."""
        at_the_start = not self.done and self.collected is None
        return self.done if self.unwritten or at_the_start else self.done + 1

    @property
    def next_rollout(self) -> int:
        """The first iteration whose responses are yet to be written."""
        return self.done + 1 if self.collected is None else self.done + 2

    def in_words(self, config: Config) -> str:
        """As it is told behind "after"."""
        done = f"iteration {self.done} of {config.iterations}"
        if self.collected is None:
            return done
        return f"{done} and {len(self.collected.results)} of {config.update.updates} updates of the next"


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
        "collected": progress.collected and progress.collected.metrics, "run": dict(record),
    }  # fmt: skip
    arrays, number = {}, progress.done
    if group_count(progress.backlog.waiting):
        arrays |= prefixed("waiting", to_arrays(progress.backlog.waiting))
    if progress.collected:
        arrays |= prefixed("experience", to_arrays(progress.collected.experience))
        arrays |= prefixed("results", results_to_arrays(progress.collected.results))
        number += 1
    checkpoints.save(number, progress.state, extra, arrays, score=score)


def restore(config: Config, parts: Parts, checkpoints: Checkpoints) -> Progress | None:
    """From the newest sound checkpoint; None if there is none.

    Raises:
        ValueError: it has other arrays than this run, or is amid updates that were begun with other settings.
    """
    with activity.doing("reading the checkpoint", gauge=activity.traffic):
        restored = checkpoints.restore(abstract_state(parts))
    if restored is None:
        return None
    number, state, extra, arrays = restored
    waiting = without_prefix("waiting", arrays)
    backlog = Backlog(extra["position"], usable(config, from_arrays(waiting)) if waiting else nothing_drawn(config).waiting)
    progress = Progress(number, state, extra["skipped_in_a_row"], backlog, extra["unwritten"])
    if extra["collected"] is None:
        return progress
    refuse_changes_amid(config, extra["run"].get("settings", {}), number)
    experience, results = from_arrays(without_prefix("experience", arrays)), results_from_arrays(without_prefix("results", arrays))
    return progress._replace(done=number - 1, collected=Collected(experience, extra["collected"], results))


def usable(config: Config, waiting: Experience) -> Experience:
    """The groups that wait; none of them where sizes were changed on purpose since they were sampled."""
    settings = config.rollout
    shape = (group_size(waiting), waiting.prompts.tokens.shape[1], waiting.rollout.response.shape[1])
    fits = shape == (settings.group_size, settings.max_prompt, settings.max_response)
    if fits and group_count(waiting) < settings.prompts * (1 + settings.staleness):  # an iteration begins with a draw
        return waiting
    say(f"note: {group_count(waiting)} groups that waited were sampled for other sizes (rollout was changed); they are left out")
    return nothing_drawn(config).waiting


def refuse_changes_amid(config: Config, before: Mapping[str, Any], iteration: int) -> None:
    """Raises ValueError if updates of an iteration would go on under other settings, even if the change is accepted."""
    changed = changed_settings(config, before)
    if changed:
        raise ValueError(
            f"the newest checkpoint is amid the updates of iteration {iteration}, which began with other settings ({', '.join(changed)});"
            f" finish it with those and --config.iterations={iteration}, and change them then."
        )


def is_complete(found: tuple[int, dict] | None, iterations: int) -> bool:
    """Whether the newest checkpoint, as from `peek`, is of a run that has done so many iterations and written all there is of them."""
    if found is None:
        return False
    number, extra = found
    amid = extra.get("unwritten") is not None or extra.get("collected") is not None
    return number - amid >= iterations


def prefixed(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"name": ...} as {"prefix/name": ...}."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def without_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The other way round; leaves out what does not have it."""
    return {name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")}


def results_to_arrays(results: Sequence[tuple[Totals, StepFigures]]) -> dict[str, np.ndarray]:
    """The figures of N updates, one array [N, ...] for each; empty of none."""
    if not results:
        return {}
    totals, figures = jax.tree.map(lambda *values: np.stack(values), *results)
    return prefixed("sums", totals.sums) | prefixed("maxima", totals.maxima) | prefixed("figures", figures._asdict())


def results_from_arrays(arrays: Mapping[str, np.ndarray]) -> list[tuple[Totals, StepFigures]]:
    """The other way round."""
    if not arrays:
        return []
    sums, maxima, figures = (without_prefix(name, arrays) for name in ("sums", "maxima", "figures"))
    stacked = Totals(sums, maxima), StepFigures(**figures)
    return [jax.tree.map(lambda values, number=number: values[number], stacked) for number in range(len(figures["skipped"]))]
