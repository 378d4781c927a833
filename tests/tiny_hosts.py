"""A run of seconds for several processes, and a way to make several such runs without starting anew for each.

    python -m dgpo_jax.launch --processes=2 -- dgpo_jax.train --config=tests/tiny_hosts.py
    python -m dgpo_jax.launch --processes=2 -- tests.tiny_hosts --workdir=a --config.seed=1 / --workdir=b --config.seed=2

Smaller than tests/tiny_config.py: a process spends most of its life importing and compiling, and there are many of them.
"""

import sys
import traceback

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
    """Makes the runs, whose arguments a '/' divides, one after the other; the processes are joined once for all."""
    from dgpo_jax import hosts
    from dgpo_jax.config import parse_command
    from dgpo_jax.session import use_compilation_cache
    from dgpo_jax.train import train

    runs = [[]]
    for argument in arguments:
        runs.append([]) if argument == "/" else runs[-1].append(argument)
    parsed = [parse_command([f"--config={__file__}", *run], program="tiny_hosts", description="")[:2] for run in runs]
    use_compilation_cache()
    hosts.join(parsed[0][0].hosts)
    try:
        for config, workdir in parsed:
            train(config, workdir)
    except Exception:  # else this process waits at its end for the others, and they for it
        traceback.print_exc()
        hosts.leave(1)


if __name__ == "__main__":
    main(sys.argv[1:])
