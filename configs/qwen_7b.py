"""DeepSeek-R1-Distill-Qwen-7B learns mathematics by DGPO: the middle one of the three models of the paper.

    python -m dgpo_jax.train --config=configs/qwen_7b.py

Not run yet: these settings have been loaded, not trained with, so no score is promised.

Hardware: one machine with 8 GPUs of 141 GB.
The sampler decodes as many of the 1024 responses at once as fit; with all of them, per device, activations apart: 14 GiB of training
    state, 7 GiB of weights for decoding, 70 GiB of cache. The table printed at start says it for your devices.
A checkpoint is 91 GB and two are kept. On a machine without the hub, give a folder: --config.model.path=FOLDER.

Data, to be put in place first; one JSON object a line with the fields `problem` and `answer`:
    data/math_train.jsonl   competition problems such as DAPO-Math-17k or DeepScaleR, without any instruction in the text
    data/aime24.jsonl       the 30 problems of AIME 2024; not among the training problems
Other places and names: --config.data.train=FILE, --config.data.problem_field=NAME, --config.data.answer_field=NAME.

What DGPO (arXiv 2603.14389) and its code state: this model, GRPO advantages, the mean over tokens, no KL and no entropy
bonus in their example, n = 1 and m = 2 (the default, and what it names for 7B and larger), evaluation on AIME24
and others with 32 samples a problem.
What we found in neither: training set, prompts, samples and updates per iteration, learning rate, clipping bounds, lengths,
temperatures, number of iterations; their script is a demonstration on GSM8K. The rest here is therefore
    Klear-Reasoner's (arXiv 2508.07629): 128 prompts x 8 samples, bounds 0.2 and 0.28, learning rate 1e-6 after 10
        iterations of warm-up, weight decay 0.1, gradient norm 1, sampling at temperature 1
    8 updates per iteration, as in Klear-Reasoner's script for mathematics
    responses of up to 8192 tokens, as in DAPO's 7B script; Klear-Reasoner's 32K do not fit this machine
    without a dual clip, as in DGPO's code; and without the dynamic sampling of Klear-Reasoner and DAPO (rollout.dynamic_sampling)
Rewards are 1 and 0. DAPO's 1 and -1 give the same advantages, since a group's mean and spread are taken out.
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
        name="qwen_7b",
        iterations=400,
        model=ModelConfig(
            path="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", vocab_size=152064, layers=28, width=3584, heads=28,
            key_heads=4, head_width=128, mlp_width=18944, qkv_bias=True, tied_embeddings=False, rope_theta=10000.0,
            norm_eps=1e-6, remat="full",
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
        data=DataConfig(
            train="data/math_train.jsonl", held_out="data/aime24.jsonl", too_long="drop",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        rollout=RolloutConfig(prompts=128, group_size=8, max_prompt=2048, max_response=8192),
        reward=RewardConfig(extract="boxed", workers=16),
        loss=LossConfig(method="dgpo", n=1.0, m=2.0),
        update=UpdateConfig(updates=8, tokens_per_row=10240, tokens_per_device=10240, logprob_chunk=1024),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=10, weight_decay=0.1, clip_norm=1.0),
        eval=EvalConfig(every=10, problems=30, samples=32, temperature=0.6),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )  # fmt: skip
