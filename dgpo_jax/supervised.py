"""The supervised warm start: worked solutions, the same programs as a policy update with every advantage 1.

A phase of its own with files of its own under `workdir/sft/`. `train` runs it before the first iteration where
`sft.updates` asks for one; `python -m dgpo_jax.sft` runs it alone.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgpo_jax import activity
from dgpo_jax.build import Parts, abstract_state, build_state, load
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import Config, SftConfig
from dgpo_jax.data.problems import ProblemStream
from dgpo_jax.data.prompts import encode_examples, encode_solution, fit
from dgpo_jax.learning import row_shape
from dgpo_jax.metrics import WARM_START_COLUMNS, progress
from dgpo_jax.rl.packing import Example, pack
from dgpo_jax.rl.update import LossSettings, Programs, make_programs, take_update
from dgpo_jax.session import open_writer, say
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.stopping import Stop, Stopping
from dgpo_jax.types import Problem, TrainState
from dgpo_jax.workdir import WARM_START, settle

SUPERVISED = LossSettings("reinforce", {}, temperature=1.0, logprob_chunk=512)


class Skipped(NamedTuple):
    """Updates that changed nothing, for something in them was not finite. Checkpoints keep it: a stop changes no later line, nor what ends the run."""

    since_line: int = 0  # since the last line of metrics
    in_a_row: int = 0  # up to the last update
    longest: int = 0  # in a row, as it was at any time since the last line

    def after(self, flags: Iterable[bool]) -> "Skipped":
        """With so many updates more, each of which was skipped or not."""
        since_line, in_a_row, longest = self
        for skipped in flags:
            since_line, in_a_row = since_line + bool(skipped), in_a_row + 1 if skipped else 0
            longest = max(longest, in_a_row)
        return Skipped(since_line, in_a_row, longest)

    def after_line(self) -> "Skipped":
        """With a line of metrics written."""
        return Skipped(in_a_row=self.in_a_row)


def warm_start(config: Config, parts: Parts, workdir: Path, stopping: Stopping, stream: ProblemStream, record: Mapping[str, Any]) -> TrainState:
    """Trains on `sft.updates` minibatches of worked solutions.

    Goes on from its own newest checkpoint; its metrics are in `workdir/sft/metrics.jsonl`, one object per update.

    Args:
        stopping: asked between updates; before it raises Stop, what has been learned is saved.
        stream: from `solved_problems`.
        record: of the run, from `workdir.claim_sets`.
    Returns:
        The state after the last update, its optimizer's moments included.
    Raises:
        ValueError: a solution that does not fit the response slots, or optimizer.max_skipped updates skipped in a row.
    """
    loss = SUPERVISED._replace(logprob_chunk=config.update.logprob_chunk)
    programs = make_programs(parts.model, parts.optimizer, loss, parts.shardings)
    folder = workdir / WARM_START
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        done, state, skipped = find_start(config, parts, checkpoints)
        settle(config, workdir, record)

        def save() -> None:
            checkpoints.save(done, state, {"run": dict(record), "skipped": skipped._asdict()})

        with (
            open_writer(folder, done + 1, console_columns=WARM_START_COLUMNS, unit="update") as writer,
            activity.doing("warm start", lambda: f"update {done} of {config.sft.updates}"),
            progress("warm start", config.sft.updates) as advance,
        ):
            advance(done)
            began, logged, first = time.perf_counter(), done, done
            flags = []  # of the updates that `skipped` does not count yet, on the device: to ask each at once would wait for it
            for update in range(done + 1, config.sft.updates + 1):
                try:
                    stopping.update(limited=True)
                except Stop:
                    skipped = skipped.after(to_host(flags))
                    if done > first and not skipped.in_a_row:
                        save()
                        checkpoints.wait(required=True)
                    say(how_it_stopped(config, stopping, done, skipped))
                    raise
                state, results = supervised_update(config, parts, programs, stream, state, update - 1)
                flags.append(results[1].skipped)
                done, last = update, update == config.sft.updates
                line, due = last or update % config.sft.log_every == 0, last or update % config.sft.checkpoint_every == 0
                if line or due:
                    skipped, flags = skipped.after(to_host(flags)), []
                if line:
                    metrics = to_metrics(results) | {"optim/skipped": float(skipped.since_line)}
                    # Updates run behind the host, so only their mean since the last line is a time.
                    seconds = (time.perf_counter() - began) / (update - logged)
                    began, logged = time.perf_counter(), update
                    speed = metrics["sft/tokens"] / seconds / parts.mesh.size
                    metrics |= {"time/update": seconds, "speed/update_tokens_per_second_per_device": speed}
                    writer.write(update, metrics)
                    check_skipped(config, skipped, folder)
                    skipped = skipped.after_line()
                if due and (last or not skipped.in_a_row):  # weights that have gone wrong must not displace good ones
                    save()
                advance()
    return state


def find_start(config: Config, parts: Parts, checkpoints: Checkpoints) -> tuple[int, TrainState, Skipped]:
    """Where the warm start goes on: after how many updates, and with what."""
    with activity.doing("reading or making weights", gauge=activity.traffic):
        restored = checkpoints.restore(abstract_state(parts))
        if restored is None:
            return 0, build_state(config, parts), Skipped()
    return restored.iteration, restored.state, Skipped(**restored.extra.get("skipped", {}))


def how_it_stopped(config: Config, stopping: Stopping, done: int, skipped: Skipped) -> str:
    """A line for the person watching, of a warm start that was asked to stop."""
    if skipped.in_a_row:
        return f"warm start stopped ({stopping.reason}) while updates are being skipped, so nothing was saved: the same command goes on from its newest checkpoint"
    return f"warm start stopped ({stopping.reason}) and saved after update {done} of {config.sft.updates}; the same command goes on"


def check_skipped(config: Config, skipped: Skipped, folder: Path) -> None:
    """Ends a warm start of which too many updates in a row were skipped; nothing was saved amid them.

    Raises:
        ValueError: with what happened.
    """
    if skipped.longest >= config.optimizer.max_skipped:
        raise ValueError(
            f"{skipped.longest} updates of the warm start in a row had a gradient, a loss or a log-probability that is not finite, and"
            f" optimizer.max_skipped is {config.optimizer.max_skipped}; lower sft.learning_rate, or look at its solutions, and delete"
            f" {folder} to begin it anew."
        )


def solved_problems(config: Config, parts: Parts) -> ProblemStream:
    """What the warm start learns from: sft.data, or else the run's own problems; either way prompts that fit.

    Raises:
        ValueError: a problem without a solution, or with one that does not fit the response slots: found only when it is drawn,
            it would end the warm start in the middle, as often as that is started again.
    """
    stream = _fitting_stream(config, parts) if config.sft.data else parts.stream
    check_solutions(config, parts, stream.problems)
    return stream


def check_solutions(config: Config, parts: Parts, problems: Iterable[Problem]) -> None:
    """Raises ValueError if a problem has no solution, or one of more than rollout.max_response tokens."""
    limit, too_long = config.rollout.max_response, []
    for problem in problems:  # once: some are made as they are asked for
        if not problem.solution:
            raise ValueError(
                f"problem {problem.id} has no solution to learn from; add the field 'solution', name other problems in"
                " sft.data, or set sft.updates to 0."
            )
        length = len(encode_solution(problem, parts.tokenizer, parts.template))
        if length > limit:
            too_long.append((problem.id, length))
    if too_long:
        longest = max(length for _, length in too_long)
        raise ValueError(
            f"{len(too_long)} solutions of the warm start have more than rollout.max_response {limit} tokens, such as that of problem"
            f" {too_long[0][0]} with {too_long[0][1]}; raise it (the longest has {longest}), or leave them out (prepare.max_solution)."
        )


def _fitting_stream(config: Config, parts: Parts) -> ProblemStream:
    problems = load(config.data, config.sft.data, config.seed)
    limit, policy = config.rollout.max_prompt, config.data.too_long
    fitted = fit(problems, parts.tokenizer, parts.template, limit, policy)
    if fitted.dropped:
        say(f"warning: {fitted.dropped} of {len(problems)} problems of sft.data were dropped as longer than {limit} tokens")
    if fitted.cut:
        say(f"warning: {fitted.cut} of {len(problems)} problems of sft.data were cut to {limit} tokens")
    return ProblemStream(fitted.problems, config.seed)


def supervised_update(config: Config, parts: Parts, programs: Programs, stream: ProblemStream, state, update: int):
    """One optimizer step on the next `sft.examples` problems of the stream; figures stay on the device."""
    problems = stream.take(update * config.sft.examples, config.sft.examples)
    pairs = encode_examples(
        problems, parts.tokenizer, parts.template, config.rollout.max_prompt, config.rollout.max_response
    )
    tokens = sum(len(response) for _, response in pairs)
    examples = [
        Example(np.array(prompt, np.int32), np.array(response, np.int32), 0.0, 0.0, advantage=1.0, weight=1 / tokens)
        for prompt, response in pairs
    ]
    batches = pack(examples, **row_shape(config, parts), pad_id=parts.tokenizer.pad_id)
    rate = np.float32(learning_rate(config.sft, update))
    on_device = (to_device(batch, parts.shardings.batch) for batch in batches)
    state, totals, figures = take_update(programs, state, on_device, to_device(rate, parts.shardings.scalar))
    return state, (totals, figures, float(rate))


def to_metrics(of_update) -> dict[str, float]:
    """The figures of one update as they are written, but what is counted since the last line."""
    totals, figures, rate = of_update
    totals, figures = to_host((totals, figures))
    tokens = float(totals.sums["tokens"])
    return {
        "sft/loss": float(totals.sums["loss"]),
        "sft/entropy": float(totals.sums["entropy"]) / tokens,
        "sft/tokens": tokens,
        "optim/grad_norm": float(figures.grad_norm),
        "optim/learning_rate": rate,
    }


def learning_rate(config: SftConfig, update: int) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last update."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    share = (update - config.warmup_updates) / max(1, config.updates - config.warmup_updates)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
