"""A run of seconds for several processes, and a way to make several such runs without starting anew for each.

    python -m dgpo_jax.launch --processes=2 -- dgpo_jax.train --config=tests/tiny_hosts.py
    python -m dgpo_jax.launch --processes=2 -- tests.tiny_hosts --workdir=a --config.seed=1 / --workdir=b --config.seed=2

Smaller than tests/tiny_config.py: a process spends most of its life importing and compiling, and there are many of them.
"""

import os
import signal
import sys
import time
from itertools import count

from dgpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HostsConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    UpdateConfig,
)


def get_config() -> Config:
    """The settings of the run."""
    return Config(
        name="hosts",
        iterations=3,
        grace_seconds=300.0,  # on a busy machine the iteration under way still counts as one that fits
        model=ModelConfig(
            vocab_size=192, layers=1, width=16, heads=4, key_heads=2, head_width=8, mlp_width=32,
            initializer_std=0.1, dtype="float32", remat="none",
        ),
        data=DataConfig(
            train="generated:arithmetic/train", held_out="generated:arithmetic/test", tokenizer="builtin:words",
            template="plain", size=40, low=0, high=4, operations="add",
        ),
        rollout=RolloutConfig(prompts=8, group_size=4, max_prompt=32, max_response=12),
        reward=RewardConfig(extract="last", workers=1),
        update=UpdateConfig(updates=2, tokens_per_row=64, tokens_per_device=64, logprob_chunk=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_iterations=2),
        # Long enough that some answers are right: else no group differs, and no update does anything.
        sft=SftConfig(updates=10, examples=16, learning_rate=3e-2, warmup_updates=2, log_every=5, checkpoint_every=10),
        eval=EvalConfig(every=2, problems=5, samples=2, greedy=False),
        checkpoint=CheckpointConfig(every=1, keep=12),
        hosts=HostsConfig(heartbeat_s=10, start_s=120),
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Makes the runs, whose arguments a '/' divides, one after the other; the processes are joined once for all.

    Two words are no runs: `fault` is what process 1 then has, while the others wait for it; after `stop-at update 6` the next run
    is stopped there.
    """
    from dgpo_jax.config import parse_command
    from dgpo_jax.session import run_command
    from dgpo_jax.train import train

    runs = [[]]
    for argument in arguments:
        runs.append([]) if argument == "/" else runs[-1].append(argument)

    def story(*_) -> None:
        for run in runs:
            if run == ["fault"]:
                fault()
            elif run[0] == "stop-at":
                stop_at(*run[1:])
            else:
                train(*parse_command([f"--config={__file__}", *run], program="tiny_hosts", description="")[:2])

    sys.argv[1:] = [f"--config={__file__}"]  # by whose settings the processes are joined
    run_command("tests.tiny_hosts", "", story, several=True)


def fault() -> None:
    """A KeyError on process 1."""
    from dgpo_jax import hosts

    if not hosts.is_first():
        raise KeyError("a key that is not there")
    hosts.gather("the others")


def stop_at(question: str, number: str) -> None:
    """Has the next run be stopped at the so many-th question of this kind in its second iteration.

    Process 0 signals itself there, and all wait until each has told JAX which question it asked last: they stop at the one behind.
    """
    from dgpo_jax import hosts
    from dgpo_jax.stopping import Stopping

    ask, boundary, iterations, asked = getattr(Stopping, question), Stopping.boundary, count(1), count(1)
    iteration = 0

    def begin(self, *arguments, **settings) -> None:
        nonlocal iteration
        iteration = next(iterations)
        boundary(self, *arguments, **settings)

    def signal_first(self, *arguments, **settings) -> None:
        if iteration == 2 and next(asked) == int(number):
            if hosts.is_first():
                os.kill(os.getpid(), signal.SIGTERM)
            while len(hosts.coordination_client().key_value_dir_get("PREEMPTION_CURRENT_COUNTER/")) < hosts.count():
                time.sleep(0.05)
        ask(self, *arguments, **settings)

    Stopping.boundary = begin
    setattr(Stopping, question, signal_first)


if __name__ == "__main__":
    main(sys.argv[1:])
