"""DeepSeek-R1-Distill-Qwen-14B with responses of up to 32768 tokens, on 64 TPU v5p chips.

    python -m dgpo_jax.train --config=configs/qwen_14b_32k_v5p.py

Not run yet: compiled for this slice by the dry run, which is where the claim that it fits comes from (docs/dryrun.md has
the figures); no chip has executed it and no score is promised.
Hardware: v5p-128, 64 chips with 95 GB each. That is sixteen hosts, which this release cannot drive yet: the sizes are proven,
the run has to wait.
    python -m dgpo_jax.dryrun --config=configs/qwen_14b_32k_v5p.py --topology=v5p:4x4x4

Model, recipe, data and where each setting comes from: configs/qwen_14b.py. Other than there: rows and
slots for the longer responses, and a mesh for this slice.
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
        name="qwen_14b_32k_v5p",
        iterations=400,
        model=ModelConfig(
            path="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", vocab_size=152064, layers=48, width=5120, heads=40,
            key_heads=8, head_width=128, mlp_width=13824, qkv_bias=True, tied_embeddings=False, rope_theta=1000000.0,
            norm_eps=1e-5, remat="full",
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
        data=DataConfig(
            train="data/math_train.jsonl", held_out="data/aime24.jsonl", too_long="drop",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        rollout=RolloutConfig(prompts=128, group_size=8, max_prompt=2048, max_response=32768, slots=256),
        reward=RewardConfig(extract="boxed", workers=16),
        loss=LossConfig(method="dgpo", n=1.0, m=2.0),
        update=UpdateConfig(updates=16, tokens_per_row=34816, tokens_per_device=34816, logprob_chunk=512),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=10, weight_decay=0.1, clip_norm=1.0),
        eval=EvalConfig(every=10, problems=30, samples=32, temperature=0.6),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )  # fmt: skip
