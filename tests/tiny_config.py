"""A run of seconds: what tests of the whole program train.

    python -m dgpo_jax.train --config=tests/tiny_config.py

Sums of numbers up to 4 and a warm start just long enough that some answers are right, so that groups differ and
updates do something. Sizes divide over 8 devices, as data 8 and as fsdp 4 x tensor 2.
"""

from dgpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
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
        name="tiny",
        iterations=5,
        model=ModelConfig(
            vocab_size=192, layers=2, width=32, heads=4, key_heads=2, head_width=8, mlp_width=64,
            initializer_std=0.1, dtype="float32", remat="none",
        ),
        data=DataConfig(
            train="generated:arithmetic/train", held_out="generated:arithmetic/test", tokenizer="builtin:words",
            template="plain", size=200, low=0, high=4, operations="add",
        ),
        rollout=RolloutConfig(prompts=8, group_size=4, max_prompt=32, max_response=12),
        reward=RewardConfig(extract="last", workers=1),
        update=UpdateConfig(updates=2, tokens_per_row=64, tokens_per_device=256, logprob_chunk=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_iterations=2),
        sft=SftConfig(updates=60, examples=16, learning_rate=1e-2, warmup_updates=5, log_every=5, checkpoint_every=20),
        eval=EvalConfig(every=2, problems=12, samples=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )  # fmt: skip
