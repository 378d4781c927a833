"""DeepSeek-R1-Distill-Qwen-7B with responses of up to 16384 tokens, on eight TPU v5p or sixteen v6e chips.

    python -m dgpo_jax.train --config=configs/qwen_7b_16k_tpu.py

Not run yet: compiled for this slice by the dry run, which is where the claim that it fits comes from (docs/dryrun.md has
the figures); no chip has executed it and no score is promised.
Hardware: v5p-16, eight chips with 95 GB each, or v6e-16, sixteen chips with 32 GB. Either is several hosts, which this release
cannot drive yet: the sizes are proven, the run has to wait.
    python -m dgpo_jax.dryrun --config=configs/qwen_7b_16k_tpu.py --topology=v5p:2x2x2
    python -m dgpo_jax.dryrun --config=configs/qwen_7b_16k_tpu.py --topology=v6e:4x4

Model, recipe, data and where each setting comes from: configs/qwen_7b.py. Other than there: rows and slots for
the longer responses, a mesh for these slices, and microbatches of one row.
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
        name="qwen_7b_16k_tpu",
        iterations=400,
        model=ModelConfig(
            path="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", vocab_size=152064, layers=28, width=3584, heads=28,
            key_heads=4, head_width=128, mlp_width=18944, qkv_bias=True, tied_embeddings=False, rope_theta=10000.0,
            norm_eps=1e-6, remat="full",
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
        data=DataConfig(
            train="data/math_train.jsonl", held_out="data/aime24.jsonl", too_long="drop",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        rollout=RolloutConfig(prompts=128, group_size=8, max_prompt=2048, max_response=16384, slots=128),
        reward=RewardConfig(extract="boxed", workers=16),
        loss=LossConfig(method="dgpo", n=1.0, m=2.0),
        update=UpdateConfig(updates=8, tokens_per_row=18432, tokens_per_device=18432, logprob_chunk=512),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=10, weight_decay=0.1, clip_norm=1.0),
        eval=EvalConfig(every=10, problems=30, samples=32, temperature=0.6),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )  # fmt: skip
