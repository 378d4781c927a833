"""Several methods, several seeds, one budget of iterations: runs them all, and says which did best and how sure that is.

    python -m dgpo_jax.compare --config=configs/smoke.py --methods='grpo,dgpo,dgpo(n=2,m=2)' --seeds=0,1,2

A method may bring settings of the loss in parentheses (which the shell wants quoted). What the command line gives is the same
for all; what it leaves open is each method's own, and the table lists the settings that come to differ: `dapo` samples more
responses than others unless --config.rollout.dynamic_sampling=False, and published bounds are not all the same.

Each run is a process of its own, `python -m dgpo_jax.train`, so one that crashes or collapses is written down and the others go
on. With --jobs=N, N of them run at a time, each on its share of the cores; on an accelerator leave it at 1.

The same command goes on where it was stopped: finished runs are not started again, the others go on from their newest
checkpoint. More methods, seeds or iterations may be asked for later. --report-only computes nothing and reports what is
there.

Methods with the same seed meet the same problems and random numbers. Where sft.updates asks for a warm start, it is run
once per seed and copied, so that they begin with the same weights, to the bit.

    WORKDIR/table.md, results.csv                 what came out: means over seeds, and one line per run
    WORKDIR/*.png                                 accuracy, entropy, gradient norm and ratios over iterations; weights over the ratio
    WORKDIR/METHOD/seed_K/                        the workdir of a run, with log.txt, and failure.txt if it failed
    WORKDIR/warm_start/seed_K/                    the warm start of a seed
"""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from dgpo_jax.checkpoint import peek
from dgpo_jax.comparison import AVERAGE, FAILURE, GREEDY, Result, make_table, read_result, series, to_csv
from dgpo_jax.comparison_plan import Plan, Run, parse_plan
from dgpo_jax.comparison_plots import Weights, plot_comparison, plot_weights
from dgpo_jax.files import alone_in
from dgpo_jax.methods import gradient_weights, trust_region
from dgpo_jax.processes import Job, run_all, why_failed
from dgpo_jax.restart import is_complete
from dgpo_jax.session import in_words, say
from dgpo_jax.workdir import claim_workdir, write_config

RATIOS = np.geomspace(0.01, 100, 2001)  # of weights.png


def compare(plan: Plan) -> list[Result]:
    """Runs what has not been run yet, then reports.

    Returns:
        All runs in the order of the table, those that failed among them.
    Raises:
        ValueError: the workdir holds a comparison with other settings, or somebody is at work there.
    """
    if not plan.report_only:
        claim_workdir(plan.config, plan.workdir)
        with alone_in(plan.workdir):
            write_config(plan.config, plan.workdir)

            # Act 1, warm starts: one per seed, for all its methods.
            if plan.config.sft.updates:
                run_warm_starts(plan)

            # Act 2, runs: each a process, in any state of completion.
            run_the_rest(plan)

    # Act 3, report: of what is in the files, whoever wrote them.
    return report(plan)


def run_warm_starts(plan: Plan) -> None:
    """Those that a run still waits for. Where one fails its runs cannot start, and the other seeds go on."""
    seeds = dict.fromkeys(run.seed for run in plan.runs() if not has_begun(plan, run))
    jobs = [
        Job(
            command("sft", plan, plan.warm_start(seed), [f"--config.seed={seed}"]),
            plan.warm_start(seed) / "log.txt",
            seed,
        )
        for seed in seeds
        if not is_done(plan.warm_start(seed), 0)
    ]

    def ended(job: Job, code: int, seconds: float) -> None:
        say(f"warm start, seed {job.about}: {note_failure(job, code) or f'{seconds:.0f} s'}")

    def starting(job: Job) -> None:
        forget_failure(plan.warm_start(job.about))

    run_all(jobs, plan.jobs, ended, starting)


def run_the_rest(plan: Plan) -> None:
    """All runs that are not finished and can start, from wherever they are."""
    runs = plan.runs()
    waiting = [run for run in runs if not is_done(run.workdir, plan.config.iterations)]
    ready = [run for run in waiting if has_begun(plan, run) or is_done(plan.warm_start(run.seed), 0)]
    ended_so_far = len(runs) - len(ready)
    if ended_so_far:
        say(f"[{ended_so_far}/{len(runs)}] finished before, or without a warm start")

    def starting(job: Job) -> None:
        if not has_begun(plan, job.about):
            copy_warm_start(plan.warm_start(job.about.seed), job.about.workdir)
        forget_failure(job.about.workdir)

    def ended(job: Job, code: int, seconds: float) -> None:
        nonlocal ended_so_far
        ended_so_far += 1
        result = note_failure(job, code) or f"{scores(job.about)}, {seconds:.0f} s"
        say(f"[{ended_so_far}/{len(runs)}] {job.about.method.label} seed {job.about.seed}: {result}")

    jobs = [
        Job(
            command("train", plan, run.workdir, [*run.method.arguments(), f"--config.seed={run.seed}"]),
            run.workdir / "log.txt",
            run,
        )
        for run in ready
    ]
    run_all(jobs, plan.jobs, ended, starting)


def has_begun(plan: Plan, run: Run) -> bool:
    """Whether it needs no warm start from us: it has one (its folder appears together with the copy), or none is asked for."""
    return not plan.config.sft.updates or run.workdir.exists()


def is_done(workdir: Path, iteration: int) -> bool:
    """Whether there is a checkpoint of the iteration, or of a later one."""
    return is_complete(peek(workdir / "checkpoints"), iteration)


def copy_warm_start(source: Path, workdir: Path) -> None:
    """Gives a run its weights, and the record of how they came about; a kill leaves no half copy in its place.

    Not the checkpoint of iteration 0: it belongs to a run with the settings of the source.
    """
    partial = workdir.with_name(f"{workdir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / "sft", partial / "sft")  # a copy and not a link: the run may write into it
    os.replace(partial, workdir)


def command(story: str, plan: Plan, workdir: Path, arguments: Sequence[str]) -> list[str]:
    """What is typed to do the same by hand; of two values for one setting the later counts."""
    return [sys.executable, "-m", f"dgpo_jax.{story}", *plan.arguments, f"--workdir={workdir}", *arguments]


def note_failure(job: Job, code: int) -> str:
    """Leaves the reason in the folder of the job and returns it; "" where there was no failure."""
    if not code:
        return ""
    why = why_failed(job, code)
    (job.log.parent / FAILURE).write_text(f"{why}\n")
    return f"FAILED, {why}"


def forget_failure(workdir: Path) -> None:
    """The next attempt has begun."""
    (workdir / FAILURE).unlink(missing_ok=True)


def scores(run: Run) -> str:
    """The last held-out accuracies of a run, for its line."""
    rows = read_result(run.method.label, run.seed, run.workdir, finished=True).rows
    found = {"greedy": series(rows, GREEDY), "avg@k": series(rows, AVERAGE)}
    return ", ".join(f"{name} {points[-1][1]:.1%}" for name, points in found.items() if points) or "not evaluated"


def report(plan: Plan) -> list[Result]:
    """Writes the tables and figures, prints the table."""
    results = [find_result(plan, run) for run in plan.runs()]
    table = make_table(results, f"{plan.config.name}, {plan.config.iterations} iterations", plan.differences())
    (plan.workdir / "table.md").write_text(table)
    (plan.workdir / "results.csv").write_text(to_csv(results))
    weights = [
        Weights(
            method.label, gradient_weights(config.loss, RATIOS, 1.0), gradient_weights(config.loss, RATIOS, -1.0),
            trust_region(config.loss),
        )
        for method, config in zip(plan.methods, plan.configs, strict=True)
    ]  # fmt: skip
    figures = [plot_weights(RATIOS, weights, plan.workdir / "weights.png")]
    figures += plot_comparison(results, plan.workdir, plan.config.name)
    say(f"\n{table}")
    say(f"tables   {plan.workdir}/table.md  {plan.workdir}/results.csv")
    say(f"figures  {'  '.join(map(str, figures))}")
    return results


def find_result(plan: Plan, run: Run) -> Result:
    """What became of a run; one that could not start has its warm start to blame."""
    result = read_result(run.method.label, run.seed, run.workdir, is_done(run.workdir, plan.config.iterations))
    blamed = plan.warm_start(run.seed) / FAILURE
    if not run.workdir.exists() and blamed.exists():
        return result._replace(failure=f"warm start: {blamed.read_text().strip()}")
    return result


def main() -> None:
    """The command: 0 if all runs finished, 1 if some did not, 2 if nothing was started."""
    plan = parse_plan(sys.argv[1:])
    # Whatever is computed here is small, and the accelerator belongs to the runs.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: run_all then stops its children
    try:
        results = compare(plan)
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(not all(result.finished for result in results))


if __name__ == "__main__":
    main()
