"""DeepSeek-R1-Distill-Qwen-1.5B with responses of up to 8192 tokens, on eight TPU v5e chips.

    python -m dgpo_jax.train --config=configs/qwen_1p5b_8k_v5e.py

Not run yet: compiled for this slice by the dry run, which is where the claim that it fits comes from (docs/dryrun.md has
the figures); no chip has executed it and no score is promised.
Hardware: v5litepod-8, a slice of eight chips with 16 GB each on one host.
    python -m dgpo_jax.dryrun --config=configs/qwen_1p5b_8k_v5e.py --topology=v5e:2x4

Model, recipe, data and where each setting comes from: configs/qwen_1p5b.py. Other than there: slots for
part of the responses at a time, a mesh for this slice, and microbatches of one row.
"""

from dgpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
)


def get_config() -> Config:
    """The settings of the run; the command line can change any of them."""
    return Config(
        name="qwen_1p5b_8k_v5e",
        iterations=400,
        model=ModelConfig(
            path="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", vocab_size=151936, layers=28, width=1536, heads=12,
            key_heads=2, head_width=128, mlp_width=8960, qkv_bias=True, tied_embeddings=False, rope_theta=10000.0,
            norm_eps=1e-6, remat="full",
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
        data=DataConfig(
            train="data/math_train.jsonl", held_out="data/aime24.jsonl", too_long="drop",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        rollout=RolloutConfig(prompts=128, group_size=8, max_prompt=2048, max_response=8192, slots=192),
        reward=RewardConfig(extract="boxed", workers=16),
        loss=LossConfig(method="dgpo", n=2.0, m=2.0),
        update=UpdateConfig(updates=4, tokens_per_row=10240, tokens_per_device=10240, logprob_chunk=512),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=10, weight_decay=0.1, clip_norm=1.0),
        eval=EvalConfig(every=10, problems=30, samples=32, temperature=0.6),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )  # fmt: skip
