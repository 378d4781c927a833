"""The supervised warm start: worked solutions, the same programs as a policy update with every advantage 1.

A phase of its own with files of its own under `workdir/sft/`. `train` runs it before the first iteration where
`sft.updates` asks for one; `python -m dgpo_jax.sft` runs it alone.
"""

import math
import time
from pathlib import Path

import numpy as np

from dgpo_jax import activity
from dgpo_jax.build import Parts, abstract_state, build_state, load
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import Config, SftConfig
from dgpo_jax.data.problems import ProblemStream
from dgpo_jax.data.prompts import encode_examples, fit
from dgpo_jax.learning import row_shape
from dgpo_jax.metrics import WARM_START_COLUMNS, progress
from dgpo_jax.rl.packing import Example, pack
from dgpo_jax.rl.update import LossSettings, Programs, make_programs, take_update
from dgpo_jax.session import open_writer, say
from dgpo_jax.sharding import to_device, to_host
from dgpo_jax.stopping import Stop, Stopping
from dgpo_jax.types import TrainState

SUPERVISED = LossSettings("reinforce", {}, temperature=1.0, logprob_chunk=512)


def warm_start(config: Config, parts: Parts, workdir: Path, stopping: Stopping) -> TrainState:
    """Trains on `sft.updates` minibatches of worked solutions.

    Goes on from its own newest checkpoint; its metrics are in `workdir/sft/metrics.jsonl`, one object per update.

    Args:
        stopping: asked between updates; before it raises Stop, what has been learned is saved.
    Returns:
        The state after the last update, its optimizer's moments included.
    Raises:
        ValueError: a problem without a solution, or one that does not fit the prompt and response slots.
    """
    stream = solved_problems(config, parts)
    loss = SUPERVISED._replace(logprob_chunk=config.update.logprob_chunk)
    programs = make_programs(parts.model, parts.optimizer, loss, parts.shardings)
    folder = workdir / "sft"
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        with activity.doing("reading or making weights"):
            restored = checkpoints.restore(abstract_state(parts))
            done, state = restored[:2] if restored else (0, build_state(config, parts))
        with (
            open_writer(folder, done + 1, console_columns=WARM_START_COLUMNS, unit="update") as writer,
            activity.doing("warm start", lambda: f"update {done} of {config.sft.updates}"),
            progress("warm start", config.sft.updates) as advance,
        ):
            advance(done)
            began, logged, first = time.perf_counter(), done, done
            flags = []  # of the updates since the last line, on the device: whether they were skipped
            for update in range(done + 1, config.sft.updates + 1):
                try:
                    stopping.update()
                except Stop:
                    if done > first:
                        checkpoints.save(done, state, {})
                        checkpoints.wait(required=True)
                    say(f"warm start stopped ({stopping.reason}) and saved after update {done} of {config.sft.updates}; the same command goes on")
                    raise
                last = update == config.sft.updates
                state, results = supervised_update(config, parts, programs, stream, state, update - 1)
                flags.append(results[1].skipped)
                if last or update % config.sft.log_every == 0:
                    metrics = to_metrics(results)
                    if sum(to_host(flags)) == len(flags):
                        raise ValueError(
                            f"all of the last {len(flags)} updates of the warm start had a gradient, a loss or a log-probability that"
                            " is not finite; lower sft.learning_rate, or look at its solutions."
                        )
                    flags.clear()
                    # Updates run behind the host, so only their mean since the last line is a time.
                    seconds = (time.perf_counter() - began) / (update - logged)
                    began, logged = time.perf_counter(), update
                    speed = metrics["sft/tokens"] / seconds / parts.mesh.size
                    metrics |= {"time/update": seconds, "speed/update_tokens_per_second_per_device": speed}
                    writer.write(update, metrics)
                if last or update % config.sft.checkpoint_every == 0:
                    checkpoints.save(update, state, {})
                done = update
                advance()
    return state


def solved_problems(config: Config, parts: Parts) -> ProblemStream:
    """What the warm start learns from: sft.data, or else the run's own problems; either way prompts that fit."""
    stream = _fitting_stream(config, parts) if config.sft.data else parts.stream
    unsolved = next((problem for problem in stream.problems if not problem.solution), None)
    if unsolved is not None:
        raise ValueError(
            f"problem {unsolved.id} has no solution to learn from; add the field 'solution', name other problems in"
            " sft.data, or set sft.updates to 0."
        )
    return stream


def _fitting_stream(config: Config, parts: Parts) -> ProblemStream:
    problems = load(config.data, config.sft.data, config.seed)
    limit, policy = config.rollout.max_prompt, config.data.too_long
    return ProblemStream(fit(problems, parts.tokenizer, parts.template, limit, policy).problems, config.seed)


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
    """The figures of one update as they are written."""
    totals, figures, rate = of_update
    totals, figures = to_host((totals, figures))
    tokens = float(totals.sums["tokens"])
    return {
        "sft/loss": float(totals.sums["loss"]),
        "sft/entropy": float(totals.sums["entropy"]) / tokens,
        "sft/tokens": tokens,
        "optim/grad_norm": float(figures.grad_norm),
        "optim/skipped": float(figures.skipped),
        "optim/learning_rate": rate,
    }


def learning_rate(config: SftConfig, update: int) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last update."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    share = (update - config.warmup_updates) / max(1, config.updates - config.warmup_updates)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
