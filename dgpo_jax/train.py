"""The main job: sample, check, learn, and be able to stop at any moment.

    python -m dgpo_jax.train --config=configs/smoke.py

Read `train` from top to bottom: one iteration is five acts. What an act does is in the module it calls.

Where a run goes on, in this order:
    1. the newest sound checkpoint in workdir/checkpoints;
    2. else the supervised warm start, if sft.updates asks for one, from its own newest checkpoint;
    3. else the weights of model.path, or random ones.
Metrics and rollouts of later iterations are dropped first, so that a run that was killed leaves the same files as one
that was not. A line of metrics is written before the checkpoint of its iteration: a checkpoint never lacks its line.
"""

from pathlib import Path

import jax

from dgpo_jax.build import (
    Parts,
    abstract_params,
    build_checkers,
    build_params,
    build_parts,
    build_programs,
    build_reference,
    build_state,
    fresh_state,
    make_decode_params,
)
from dgpo_jax.checkpoint import Checkpoints, locate, peek, read_params
from dgpo_jax.collecting import build_rollout, make_collect
from dgpo_jax.compiling import compile_run, rollout_programs, update_programs
from dgpo_jax.config import Config
from dgpo_jax.evaluation.in_training import make_evaluation
from dgpo_jax.learning import compute_advantages, learn, score_waiting
from dgpo_jax.metrics import MetricsWriter, progress, read_metrics
from dgpo_jax.plan import print_plan
from dgpo_jax.plots import plot_curves
from dgpo_jax.profiling import profiled
from dgpo_jax.recipe import published, resolve
from dgpo_jax.restart import Progress, at_the_start, restore, save
from dgpo_jax.rewarding import make_rewards
from dgpo_jax.rewards.checkers import Checkers
from dgpo_jax.rl.update import Programs
from dgpo_jax.session import Stopwatch, claim_problems, claim_workdir, memory_metrics, run_command, say
from dgpo_jax.speed import speed_metrics, update_work
from dgpo_jax.supervised import warm_start


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Runs or goes on with a run.

    Returns:
        The metrics of its last iteration.
    Raises:
        ValueError: a setting, the data, the weights or the checkpoint does not fit; nothing was computed.
    """
    workdir, chosen_for_you = Path(workdir), published(config)
    config = resolve(config)
    claim_workdir(config, workdir)
    found = peek(workdir / "checkpoints")
    if found and found[0] >= config.iterations > 0:
        say(f"nothing to do: all {config.iterations} iterations were done before; raise iterations to go on")
        MetricsWriter(workdir, resume_iteration=found[0] + 1).close()  # lines of a longer run that was killed
        return finish(config, workdir)
    reward = make_rewards(config)
    parts = build_parts(config)
    claim_problems(workdir, training=parts.stream.problems, held_out=parts.held_out, **parts.benchmarks)
    print_plan(config, parts, workdir, chosen_for_you)
    programs, rollout = build_programs(config, parts), build_rollout(config, parts)
    decode_params = make_decode_params(parts)
    rollout_params = make_decode_params(parts, int8=True) if config.rollout.int8_weights else decode_params

    with (
        build_checkers(config, parts.problems()) as checkers,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        check_golds(checkers, parts)
        evaluate = make_evaluation(config, parts, checkers)
        sampled_with = [(decode_params, evaluate.samplers, False), (rollout_params, {"": rollout.sampler}, config.rollout.int8_weights)]
        compiling = compile_all(config, parts, programs, sampled_with)
        done, state, skipped, backlog = find_start(config, parts, checkpoints, workdir)
        reference = find_reference(config, parts, workdir)
        with (
            MetricsWriter(workdir, resume_iteration=done + 1 if done else 0) as writer,
            progress("iterations", config.iterations) as advance,
            Stopwatch(show=lambda part: advance(0, part)) as stopwatch,
            jax.transfer_guard("disallow"),
        ):
            collect = make_collect(config, parts, programs, rollout, rollout_params, checkers, reward, writer, reference)
            advance(done)
            if not done:
                evaluation(evaluate, decode_params(state.params), writer, 0, stopwatch, {"time/compile_ahead": compiling})
            for iteration in range(done + 1, config.iterations + 1):
                with profiled(config, workdir, iteration), stopwatch("iteration"):
                    # Act 1, collect: the weights as they are answer prompts, worker processes check the answers.
                    experience, backlog, collected = collect(state.params, backlog, iteration, stopwatch)

                    # Act 2, advantages: each response against the others of its group.
                    advantages = compute_advantages(config, experience)

                    # Act 3, updates: several optimizer steps on shares of the groups.
                    with stopwatch("update"):
                        # What is learned from later needs the weights that sampled it, and these are about to change.
                        waiting = score_waiting(config, parts, programs, state.params, backlog.waiting)
                        backlog = backlog._replace(waiting=waiting)
                        state, learned = learn(
                            config, parts, programs, state, experience, advantages, iteration, reference, skipped
                        )
                    skipped = check_skipped(config, learned["optim/skipped_in_a_row"])

                work = update_work(config, parts, experience, advantages)
                metrics = collected | learned | work | stopwatch.take() | memory_metrics()
                metrics |= speed_metrics(config, parts, metrics)

                # Act 4, evaluation: held-out problems, every so many iterations and after the last.
                last = iteration == config.iterations
                due = last or (config.eval.every and iteration % config.eval.every == 0)
                evaluation(
                    evaluate, decode_params(state.params) if due else None, writer, iteration, stopwatch, metrics
                )

                # Act 5, checkpoint: from here the run can go on after a kill.
                if last or iteration % config.checkpoint.every == 0:
                    save(checkpoints, Progress(iteration, state, skipped, backlog))
                advance()
        checkpoints.wait()
    return finish(config, workdir)


def check_golds(checkers: Checkers, parts: Parts) -> None:
    """Warns of reference answers that the checker cannot match with themselves: nobody could ever get them right."""
    for name, problems in (("training", parts.stream.problems), ("held-out", parts.held_out), *parts.benchmarks.items()):
        flaws = checkers.check_golds(problems)
        for problem, why in list(flaws.items())[:1]:
            say(f"warning: {len(flaws)} {name} problems cannot be checked, such as {problem}: {why}; dgpo_jax.prepare leaves them out")


def compile_all(config: Config, parts: Parts, programs: Programs, sampled_with) -> float:
    """Compiles what every iteration will call; returns the seconds it took.

    Before the warm start, so that a model which does not fit into memory is known at once.

    Args:
        sampled_with: arguments of `rollout_programs`, but the parts.
    """
    if not config.iterations:
        return 0.0
    sampling = {program.name: program for arguments in sampled_with for program in rollout_programs(parts, *arguments)}
    return compile_run(parts, [*update_programs(config, parts, programs), *sampling.values()])


def find_start(config: Config, parts: Parts, checkpoints: Checkpoints, workdir: Path) -> Progress:
    """Where the run goes on, by the precedence in this module's docstring."""
    restored = restore(config, parts, checkpoints)
    if restored is not None:
        say(f"going on after iteration {restored.done} of {config.iterations}")
        return restored
    if not config.sft.updates:
        return at_the_start(config, build_state(config, parts))
    say(f"supervised warm start: {config.sft.updates} updates, metrics in {workdir}/sft/metrics.jsonl")
    start = at_the_start(config, fresh_state(parts, warm_start(config, parts, workdir).params))
    save(checkpoints, start)
    return start


def find_reference(config: Config, parts: Parts, workdir: Path):
    """Params of the weights that iteration 1 started from, for the KL; None, and no memory taken, where it is off.

    They are read or made once more from where the run got them, so that a checkpoint need not hold them.

    Raises:
        ValueError: the warm start that made them is gone.
    """
    if not config.kl.coefficient:
        return None
    if not config.sft.updates:
        return build_reference(parts, build_params(config, parts))
    found = peek(workdir / "sft" / "checkpoints")
    if found is None or found[0] < config.sft.updates:
        raise ValueError(
            f"{workdir}/sft/checkpoints lacks update {config.sft.updates}, whose weights kl.coefficient ="
            f" {config.kl.coefficient} keeps the policy near; put the folder back, or start in another --workdir."
        )
    return build_reference(parts, read_params(locate(workdir / "sft"), abstract_params(parts))[1])


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
