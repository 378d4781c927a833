"""The main job: sample, check, learn, and be able to stop at any moment.

    python -m dgpo_jax.train --config=configs/smoke.py

Read `train` from top to bottom: one iteration is six acts. What an act does is in the module it calls.

Where a run goes on, in this order:
    1. the newest sound checkpoint in workdir/checkpoints;
    2. else the supervised warm start, if sft.updates asks for one, from its own newest checkpoint;
    3. else the weights of model.path, or random ones.
Metrics and rollouts of later iterations are dropped first, so that a run that was killed leaves the same files as one
that was not. A line of metrics is written before the checkpoint of its iteration: a checkpoint never lacks its line.
"""

from pathlib import Path

import jax
import numpy as np

from dgpo_jax.build import (
    Parts,
    abstract_state,
    build_parts,
    build_pool,
    build_programs,
    build_state,
    fresh_state,
    make_decode_params,
)
from dgpo_jax.checkpoint import Checkpoints, peek
from dgpo_jax.config import Config
from dgpo_jax.evaluation import count_statuses, make_evaluation
from dgpo_jax.learning import learn
from dgpo_jax.metrics import MetricsWriter, progress, read_metrics
from dgpo_jax.plan import print_plan
from dgpo_jax.plots import plot_curves
from dgpo_jax.rewards.pool import VerifierPool
from dgpo_jax.rl.advantages import group_advantages
from dgpo_jax.rl.sampler import TRAINING, Draw
from dgpo_jax.rollout import Responses, build_sampling, make_rollout, to_rows
from dgpo_jax.session import Stopwatch, claim_workdir, memory_metrics, run_command, say
from dgpo_jax.supervised import warm_start
from dgpo_jax.types import TrainState


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Runs or goes on with a run.

    Returns:
        The metrics of its last iteration.
    Raises:
        ValueError: a setting, the data, the weights or the checkpoint does not fit; nothing was computed.
    """
    workdir = Path(workdir)
    claim_workdir(config, workdir)
    found = peek(workdir / "checkpoints")
    if found and found[0] >= config.iterations > 0:
        say(f"nothing to do: all {config.iterations} iterations were done before; raise iterations to go on")
        MetricsWriter(workdir, resume_iteration=found[0] + 1).close()  # lines of a longer run that was killed
        return finish(config, workdir)
    parts = build_parts(config)
    print_plan(config, parts, workdir)
    programs, decode_params = build_programs(config, parts), make_decode_params(parts)
    sampling = build_sampling(
        parts, config.rollout, group_size=config.rollout.group_size, temperature=config.rollout.temperature
    )
    rollout = make_rollout(parts, sampling, config.rollout.max_prompt)

    with (
        build_pool(config.reward) as pool,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        check_golds(pool, parts)
        evaluate = make_evaluation(config, parts, pool)
        done, state, skipped = find_start(config, parts, checkpoints, workdir)
        with (
            MetricsWriter(workdir, resume_iteration=done + 1 if done else 0) as writer,
            progress("iterations", config.iterations) as advance,
            jax.transfer_guard("disallow"),
        ):
            advance(done)
            stopwatch = Stopwatch(show=lambda part: advance(0, part))
            if not done:
                evaluation(evaluate, decode_params(state.params), writer, 0, stopwatch, {})
            for iteration in range(done + 1, config.iterations + 1):
                with stopwatch("iteration"):
                    # Act 1, rollout: the weights as they are answer the next prompts of the stream.
                    with stopwatch("rollout"):
                        position = (iteration - 1) * config.rollout.prompts
                        problems = parts.stream.take(position, config.rollout.prompts)
                        weights = decode_params(state.params)
                        responses = rollout(weights, problems, Draw(config.seed, TRAINING, iteration, 0))

                    # Act 2, verify: worker processes check the answers.
                    with stopwatch("verify"):
                        verdicts = pool.score(responses.answers())
                        rewards = to_rewards(config, verdicts)
                        writer.write_rollouts(iteration, to_rows(responses, verdicts, rewards))

                    # Act 3, advantages: each response against the others of its group.
                    rewards = rewards.reshape(-1, config.rollout.group_size)
                    advantages = group_advantages(rewards, std_floor=config.loss.std_floor)

                    # Act 4, updates: several optimizer steps on shares of the groups.
                    del weights  # the copy for decoding would otherwise live through the updates
                    with stopwatch("update"):
                        state, learned = learn(
                            config, parts, programs, state, responses, advantages, iteration, skipped
                        )
                    skipped = check_skipped(config, learned["optim/skipped_in_a_row"])

                metrics = rollout_metrics(config, responses, rewards) | count_statuses(verdicts) | learned
                metrics |= stopwatch.take() | memory_metrics() | {"data/position": position + config.rollout.prompts}
                metrics["speed/tokens_per_second_per_device"] = (
                    responses.lengths.sum() / metrics["time/rollout"] / parts.mesh.size
                )

                # Act 5, evaluation: held-out problems, every so many iterations and after the last.
                last = iteration == config.iterations
                due = last or (config.eval.every and iteration % config.eval.every == 0)
                evaluation(
                    evaluate, decode_params(state.params) if due else None, writer, iteration, stopwatch, metrics
                )

                # Act 6, checkpoint: from here the run can go on after a kill.
                if last or iteration % config.checkpoint.every == 0:
                    checkpoints.save(iteration, state, {"skipped_in_a_row": skipped})
                advance()
        checkpoints.wait()
    return finish(config, workdir)


def check_golds(pool: VerifierPool, parts: Parts) -> None:
    """Warns of held-out answers that the checker cannot match with themselves: nobody could ever get them right."""
    bad = pool.check_golds(parts.held_out)
    if bad:
        say(f"warning: {len(bad)} held-out answers cannot be checked, such as {bad[0].answer!r} of {bad[0].id}")


def find_start(config: Config, parts: Parts, checkpoints: Checkpoints, workdir: Path) -> tuple[int, TrainState, int]:
    """(iterations done, state after them, updates skipped in a row), by the precedence in this module's docstring."""
    restored = checkpoints.restore(abstract_state(parts))
    if restored is not None:
        done, state, extra = restored
        say(f"going on after iteration {done} of {config.iterations}")
        return done, state, extra["skipped_in_a_row"]
    if not config.sft.updates:
        return 0, build_state(config, parts), 0
    say(f"supervised warm start: {config.sft.updates} updates, metrics in {workdir}/sft/metrics.jsonl")
    state = fresh_state(parts, warm_start(config, parts, workdir).params)
    checkpoints.save(0, state, {"skipped_in_a_row": 0})
    return 0, state, 0


def to_rewards(config: Config, verdicts) -> np.ndarray:
    """f32[B]: reward.correct for a right answer, reward.incorrect for everything else."""
    right = np.array([verdict.correct for verdict in verdicts])
    return np.where(right, config.reward.correct, config.reward.incorrect).astype(np.float32)


def rollout_metrics(config: Config, responses: Responses, rewards: np.ndarray) -> dict[str, float]:
    """Figures of the responses themselves.

    Args:
        rewards: f32[Q, G].
    """
    lengths = responses.lengths
    return {
        "reward/mean": float(rewards.mean()),
        "reward/groups_all_right": float((rewards == config.reward.correct).all(axis=1).mean()),
        "reward/groups_all_wrong": float((rewards == config.reward.incorrect).all(axis=1).mean()),
        "rollout/response_length": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/prompt_length": float(responses.prompts.mask.sum(axis=1).mean()),
        "rollout/truncated": float(responses.rollout.truncated.mean()),
        "rollout/tokens": float(lengths.sum()),
    }


def evaluation(evaluate, weights, writer: MetricsWriter, iteration: int, stopwatch: Stopwatch, metrics: dict) -> None:
    """Evaluates unless `weights` is None, and writes the iteration's line of metrics."""
    if weights is not None:
        with stopwatch("eval"):
            scores, rows = evaluate(weights)
        if rows:
            writer.write_eval(iteration, rows)
        times = stopwatch.take()
        times["time/compile"] += metrics.get("time/compile", 0.0)
        metrics = metrics | scores | times
    writer.write(iteration, metrics)


def check_skipped(config: Config, skipped: int) -> int:
    """Stops the run when too many updates in a row had no finite gradient; else returns their number.

    Raises:
        ValueError: with what happened; the last checkpoint is intact.
    """
    if skipped >= config.optimizer.max_skipped:
        raise ValueError(
            f"{skipped} updates in a row had a gradient that is not finite, and optimizer.max_skipped is"
            f" {config.optimizer.max_skipped}; lower optimizer.learning_rate, or look at the last rollouts."
        )
    return skipped


def finish(config: Config, workdir: Path) -> dict[str, float]:
    """Draws the curves, says where everything is, and returns the last line of metrics."""
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", title=config.name)
    say(f"curves       {workdir}/curves.png")
    say(f"metrics      {workdir}/metrics.jsonl  (tensorboard --logdir {workdir}/tensorboard)")
    say(f"responses    {workdir}/rollouts/  {workdir}/eval/")
    say(f"checkpoints  {workdir}/checkpoints/")
    return read_metrics(workdir / "metrics.jsonl")[-1]


if __name__ == "__main__":
    run_command("dgpo_jax.train", "Trains a language model by reinforcement learning on checkable answers.", train)
