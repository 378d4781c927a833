"""Programs as answers, on a laptop: a tiny model learns to write Python that passes tests. Nothing is downloaded.

    python -m dgpo_jax.train --config=configs/smoke_code.py

Needs bubblewrap (Debian: apt install bubblewrap), in which the programs run without network and files. Without it,
--config.code.sandbox=rlimits runs them with limits on time and memory only; they could then read and delete your files.

Hardware: 2 CPU cores, ten minutes.
Expected: responses that hold no program in a fenced block, half of them after the warm start from a careless teacher, fall to one
in twenty, and the share of tests passed rises from 9 % to about 15 %. More is not in a model that small: it writes a right
program for some number and does not copy the one that was asked for (benchmarks/RESULTS.md).
The problems are small and of four kinds (of the forty in data/coding.py). A response earns
the share of its tests that it passes (docs/code_rewards.md).
"""

from dgpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    SftConfig,
    UpdateConfig,
)


def get_config() -> Config:
    """The settings of the run; the command line can change any of them."""
    return Config(
        name="smoke_code",
        iterations=15,
        model=ModelConfig(
            vocab_size=192, width=128, layers=4, heads=4, key_heads=2, head_width=32, mlp_width=512,
            initializer_std=0.08, remat="none",
        ),
        data=DataConfig(
            train="builtin:coding/train", held_out="builtin:coding/test", tokenizer="builtin:words", template="plain",
            operations="linear,remainder,repeat,add_to_each", size=4000, unmarked=0.5, too_long="drop",
        ),
        rollout=RolloutConfig(prompts=16, group_size=8, max_prompt=224, max_response=160),
        update=UpdateConfig(updates=4, tokens_per_row=384, tokens_per_device=3072, logprob_chunk=3072),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_iterations=2, beta2=0.99, weight_decay=0.0),
        sft=SftConfig(updates=200, examples=16, learning_rate=3e-3, checkpoint_every=50),
        eval=EvalConfig(every=5, problems=64, samples=4),
        checkpoint=CheckpointConfig(every=5),
    )  # fmt: skip
