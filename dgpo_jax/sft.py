"""The supervised warm start alone: learn worked solutions, then leave the weights where `train` goes on from.

    python -m dgpo_jax.sft --config=configs/smoke.py

With the same config (and so the same workdir) `python -m dgpo_jax.train` finds the warm-started weights as the
checkpoint of iteration 0.
"""

from contextlib import ExitStack
from pathlib import Path

from dgpo_jax.build import build_checkers, build_parts, fresh_state, make_decode_params
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import Config
from dgpo_jax.evaluation.in_training import make_evaluation
from dgpo_jax.plan import print_plan
from dgpo_jax.recipe import published, resolve
from dgpo_jax.restart import at_the_start, save
from dgpo_jax.session import run_command, say, watchdog
from dgpo_jax.stopping import Stopping
from dgpo_jax.supervised import solved_problems, warm_start
from dgpo_jax.workdir import check_disk, claim, claim_sets


def sft(config: Config, workdir: str | Path) -> dict[str, float]:
    """Runs or goes on with the warm start, and evaluates what it gave.

    Returns:
        The held-out scores; empty if the warm start had been finished before.
    Raises:
        ValueError: sft.updates is 0, or settings, data or weights do not fit.
    """
    workdir, chosen_for_you = Path(workdir), published(config)
    config = resolve(config)
    if not config.sft.updates:
        raise ValueError("sft.updates is 0, so there is nothing to do; give the number of supervised updates.")
    with ExitStack() as stack:
        found = claim(stack, config, workdir)
        if found:
            say(f"nothing to do: {workdir}/checkpoints has iteration {found[0]}, which came after the warm start")
            return {}
        stopping = stack.enter_context(Stopping(config.grace_seconds, config.stop_after_minutes * 60))
        stack.enter_context(watchdog(config, workdir, stopping))
        parts = build_parts(config)
        solved = solved_problems(config, parts)
        record = claim_sets(config, workdir, parts, found, solved)
        print_plan(config, parts, workdir, chosen_for_you)
        check_disk(config, parts, workdir)
        checkers = stack.enter_context(build_checkers(config, parts.problems()))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint.keep))
        state = fresh_state(parts, warm_start(config, parts, workdir, stopping, solved, record).params)
        save(checkpoints, at_the_start(config, state), record)
        scores, _ = make_evaluation(config, parts, checkers, stopping)(make_decode_params(parts)(state.params))
        checkpoints.wait(required=True)
    for name, value in scores.items():
        say(f"{name:<24} {value:.3f}")
    say(f"weights in {workdir}/checkpoints; python -m dgpo_jax.train with the same settings goes on from them")
    return scores


if __name__ == "__main__":
    run_command("dgpo_jax.sft", "Supervised warm start on worked solutions.", sft, several=True)
