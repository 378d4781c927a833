"""The main job: sample, check, learn, and be able to stop at any moment.

    python -m dgpo_jax.train --config=configs/smoke.py

`train` builds what a run needs; `iterate` is the run: read it from top to bottom, one iteration is five acts. What an act
does is in the module it calls.

Where a run goes on, in this order:
    1. the newest sound checkpoint in workdir/checkpoints;
    2. else the supervised warm start, if sft.updates asks for one, from its own newest checkpoint;
    3. else the weights of model.path, or random ones.
Metrics and rollouts of later iterations are dropped first, so that a run that was killed leaves the same files as one
that was not. A line of metrics is written before the checkpoint of its iteration: a checkpoint never lacks its line. (One
that a signal during an evaluation caused holds what there is of its line.)
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dgpo_jax import activity, hosts
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
from dgpo_jax.collecting import Collected, build_rollout, make_collect
from dgpo_jax.compiling import compile_run, rollout_programs, update_programs
from dgpo_jax.config import Config
from dgpo_jax.data.problems import ProblemStream
from dgpo_jax.evaluation.in_training import make_evaluation
from dgpo_jax.health import Health
from dgpo_jax.keeping import best_score, check_best_by, check_skipped, needs_saving, report_skipped
from dgpo_jax.learning import StoppedAmid, compute_advantages, learn, score_waiting
from dgpo_jax.metrics import MetricsWriter, NoMetrics, progress, read_metrics
from dgpo_jax.plan import print_plan
from dgpo_jax.plots import plot_curves
from dgpo_jax.profiling import profiled
from dgpo_jax.recipe import published, resolve
from dgpo_jax.restart import Progress, at_the_start, is_complete, restore, save
from dgpo_jax.rewarding import make_rewards
from dgpo_jax.rewards.checkers import Checkers
from dgpo_jax.rl.update import Programs
from dgpo_jax.session import Stopwatch, memory_metrics, open_writer, run_command, say, watchdog
from dgpo_jax.speed import speed_metrics, update_work
from dgpo_jax.stopping import Stop, Stopping
from dgpo_jax.supervised import solved_problems, warm_start
from dgpo_jax.workdir import check_disk, claim, claim_sets, settle


class Run(NamedTuple):
    """What every iteration uses."""

    config: Config  # resolved
    workdir: Path
    parts: Parts
    programs: Programs
    collect: Callable
    evaluate: Callable
    decode_params: Callable
    reference: Any  # params, or None
    checkpoints: Checkpoints
    record: dict  # of the run, for its checkpoints
    writer: MetricsWriter | NoMetrics
    health: Health
    stopping: Stopping
    stopwatch: Stopwatch
    advance: Callable  # the progress bar


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Runs or goes on with a run.

    Returns:
        The metrics of its last iteration.
    Raises:
        ValueError: a setting, the data, the weights or the checkpoint does not fit; nothing was computed.
        Stop: a signal or a limit ended it early. What it had done was saved: called again it goes on.
    """
    workdir, chosen_for_you = Path(workdir), published(config)
    config = resolve(config)
    with ExitStack() as stack:
        found = claim(stack, config, workdir)
        if config.iterations and is_complete(found, config.iterations):
            return nothing_to_do(config, workdir, found[0])
        stopping = stack.enter_context(Stopping(config.grace_seconds, config.stop_after_minutes * 60))
        stack.enter_context(watchdog(config, workdir, stopping))

        # In the order of what can go wrong cheaply; compiled before the first weight is read.
        reward, parts = make_rewards(config), build_parts(config)
        solved = solved_problems(config, parts) if config.sft.updates else None
        record = claim_sets(config, workdir, parts, found, solved)
        print_plan(config, parts, workdir, chosen_for_you)
        check_disk(config, parts, workdir)
        checkers = stack.enter_context(build_checkers(config, parts.problems()))
        check_golds(checkers, parts)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_best)
        )
        programs, rollout = build_programs(config, parts), build_rollout(config, parts, stopping)
        evaluate = make_evaluation(config, parts, checkers, stopping)
        decode_params = make_decode_params(parts)
        rollout_params = make_decode_params(parts, int8=True) if config.rollout.int8_weights else decode_params
        sampled_with = [(decode_params, evaluate.samplers, False), (rollout_params, {"": rollout.sampler}, config.rollout.int8_weights)]
        compiling = compile_all(config, parts, programs, sampled_with)

        now = find_start(config, parts, checkpoints, workdir, record, stopping, solved)
        reference = find_reference(config, parts, workdir)
        settle(config, workdir, record)
        writer = stack.enter_context(open_writer(workdir, resume_iteration=now.next_line, sampled=now.next_rollout))
        health = Health(config, parts.model.compute_dtype.name)
        health.replay(read_metrics(workdir / "metrics.jsonl") if hosts.is_first() else [])
        health.replay([{"iteration": now.done} | now.unwritten] if now.unwritten else [])
        advance = stack.enter_context(progress("iterations", config.iterations))
        stopwatch = stack.enter_context(Stopwatch(show=lambda part: advance(0, part)))
        collect = make_collect(config, parts, programs, rollout, rollout_params, checkers, reward, writer, reference, stopping)
        run = Run(
            config, workdir, parts, programs, collect, evaluate, decode_params, reference, checkpoints, record, writer, health,
            stopping, stopwatch, advance,
        )  # fmt: skip
        stack.enter_context(jax.transfer_guard("disallow"))
        iterate(run, now, compiling)
        checkpoints.wait(required=True)
    return finish(config, workdir)


def iterate(run: Run, now: Progress, compiling: float) -> None:
    """The iterations that are left, one after the other.

    Args:
        now: where the run stands.
        compiling: seconds that it took, for the first line of metrics.
    Raises:
        Stop: as of `train`; saved.
    """
    config, parts, programs, stopwatch = run.config, run.parts, run.programs, run.stopwatch
    saved = now
    try:
        run.advance(now.done)
        if now.unwritten:
            metrics = evaluation(run, now, now.unwritten, due=True)
            now = now._replace(unwritten=None)
            save(run.checkpoints, now, run.record, best_score(config, metrics))
            saved = now
        elif now.next_line == 0:
            evaluation(run, now, {"time/compile_ahead": compiling}, due=True)
        for iteration in range(now.done + 1, config.iterations + 1):
            last = iteration == config.iterations
            due = last or bool(config.eval.every and iteration % config.eval.every == 0)
            run.stopping.boundary(whole=now.collected is None, evaluates=due)
            with profiled(config, run.workdir, iteration), activity.doing(f"iteration {iteration}"), stopwatch("iteration"):
                # Act 1, collect: the weights as they are answer prompts, worker processes check the answers.
                if now.collected is None:  # else a stop amid the updates has left it
                    collected, backlog = run.collect(now.state.params, now.backlog, iteration, stopwatch)
                    now = now._replace(collected=collected, backlog=backlog)

                # Act 2, advantages: each response against the others of its group.
                experience, collected, results = now.collected
                advantages = compute_advantages(config, experience)

                # Act 3, updates: several optimizer steps on shares of the groups.
                with stopwatch("update"):
                    # What is learned from later needs the weights that sampled it, and these are about to change.
                    waiting = score_waiting(config, parts, programs, now.state.params, now.backlog.waiting)
                    now = now._replace(backlog=now.backlog._replace(waiting=waiting))
                    state, learned = learn(
                        config, parts, programs, now.state, experience, advantages, iteration, run.reference, now.skipped, results,
                        report=lambda rows, iteration=iteration: report_skipped(run.workdir, iteration, rows), between=run.stopping.update,
                    )  # fmt: skip

            metrics = collected | learned | update_work(config, parts, experience, advantages)
            metrics |= stopwatch.take(earlier=collected) | memory_metrics()
            metrics |= speed_metrics(config, parts, metrics)
            for warning in run.health.warnings(iteration, metrics):
                say(f"warning: {warning}")
            now = Progress(iteration, state, learned["optim/skipped_in_a_row"], now.backlog, metrics)

            # Act 4, evaluation: held-out problems, every so many iterations and after the last. It ends the line of metrics.
            metrics = evaluation(run, now, metrics, due)
            now = now._replace(unwritten=None)

            # Act 5, checkpoint: from here the run can go on after a kill.
            check_skipped(config.optimizer.max_skipped, now.skipped, run.workdir)
            score = best_score(config, metrics)
            if needs_saving(config, run.checkpoints, now, saved, score):
                save(run.checkpoints, now, run.record, score)
                saved = now
            run.advance()
    except StoppedAmid as stop:
        metrics = now.collected.metrics | stopwatch.take(earlier=now.collected.metrics)
        collected = Collected(stop.experience, metrics, stop.results)
        save_early(run, now._replace(state=stop.state, skipped=stop.skipped, collected=collected), saved)
        raise
    except Stop:
        save_early(run, now, saved)
        raise


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
    seconds = compile_run(parts, [*update_programs(config, parts, programs), *sampling.values()])
    hosts.gather(None)  # gloo gives up where processes come to the first exchange of a group more than 30 s apart
    return seconds


def find_start(
    config: Config, parts: Parts, checkpoints: Checkpoints, workdir: Path, record: dict, stopping: Stopping, solved: ProblemStream | None
) -> Progress:
    """Where the run goes on, by the precedence in this module's docstring.

    Args:
        solved: what the warm start learns from; None = there is none.
    """
    restored = restore(config, parts, checkpoints)
    if restored is not None:
        say(f"going on after {restored.in_words(config)}")
        return restored
    if solved is None:
        with activity.doing("reading or making weights", gauge=activity.traffic):
            return at_the_start(config, build_state(config, parts))
    say(f"supervised warm start: {config.sft.updates} updates, metrics in {workdir}/sft/metrics.jsonl")
    start = at_the_start(config, fresh_state(parts, warm_start(config, parts, workdir, stopping, solved, record).params))
    save(checkpoints, start, record)
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


def evaluation(run: Run, now: Progress, metrics: dict[str, Any], due: bool) -> dict[str, Any]:
    """Evaluates if that is due, and writes the line of metrics, which it returns."""
    if due:
        run.stopping.evaluation()
        with run.stopwatch("eval"):
            scores, rows = run.evaluate(run.decode_params(now.state.params))
        check_best_by(run.config.checkpoint, run.checkpoints, now.done, metrics | scores)
        if rows:
            run.writer.write_eval(now.done, rows)
        times = run.stopwatch.take()
        times["time/compile"] += metrics.get("time/compile", 0.0)
        metrics = metrics | scores | times
    run.writer.write(now.done, metrics)
    return metrics


def save_early(run: Run, now: Progress, saved: Progress) -> None:
    """Saves where the run stands, if it is not saved yet, and says how it goes on.

    Args:
        saved: what the newest checkpoint holds.
    """
    reason = run.stopping.reason
    if now.skipped and now is not saved:  # as in `needs_saving`
        say(f"stopped ({reason}) while updates are being skipped, so nothing was saved: goes on after {saved.in_words(run.config)}")
        return
    if now is not saved:
        save(run.checkpoints, now, run.record)
        run.checkpoints.wait(required=True)
    elif hosts.from_first(lambda: peek(run.workdir / "checkpoints")) is None:
        say(f"stopped ({reason}) before the first iteration, so nothing was saved: the same command begins anew")
        return
    say(f"stopped ({reason}) and saved after {now.in_words(run.config)}; the same command goes on from there")


def nothing_to_do(config: Config, workdir: Path, done: int) -> dict[str, float]:
    """Of a run that was finished before.

    Raises:
        ValueError: its metrics are gone.
    """
    hosts.from_first(lambda: require_metrics(workdir / "metrics.jsonl"))
    say(f"nothing to do: all {config.iterations} iterations were done before; raise iterations to go on")
    open_writer(workdir, resume_iteration=done + 1).close()  # lines of a longer run that was killed
    return finish(config, workdir)


def require_metrics(path: Path) -> None:
    """Refuses a finished run without its metrics: opened for writing, the file would be there and empty."""
    if not path.exists() or not read_metrics(path):
        raise ValueError(f"{path} has no line, though all iterations are done; put the file back, or raise iterations to go on without.")


def finish(config: Config, workdir: Path) -> dict[str, float]:
    """Draws the curves, says where everything is, and returns the last line of metrics."""
    hosts.from_first(lambda: plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", title=config.name))
    say(f"curves       {workdir}/curves.png")
    say(f"metrics      {workdir}/metrics.jsonl  (tensorboard --logdir {workdir}/tensorboard)")
    say(f"responses    {workdir}/rollouts/  {workdir}/eval/")
    say(f"checkpoints  {workdir}/checkpoints/")
    return hosts.from_first(lambda: read_metrics(workdir / "metrics.jsonl")[-1])


if __name__ == "__main__":
    run_command("dgpo_jax.train", "Trains a language model by reinforcement learning on checkable answers.", train, several=True)
