"""DeepSeek-R1-Distill-Qwen-14B learns mathematics by DGPO: the largest of the three models of the paper.

    python -m dgpo_jax.train --config=configs/qwen_14b.py

Not run yet: these settings have been loaded, not trained with, so no score is promised.

Hardware: 64 accelerators of 95 GB, such as a TPU v5p-128. That is several hosts, which this release cannot drive yet:
    the sizes are written down, the run has to wait.
The sampler decodes as many of the 1024 responses at once as fit; with all of them, per device, activations apart: 3.4 GiB of training
    state, 6.9 GiB of weights for decoding, 54 GiB of cache. The table printed at start says it for your devices.
A checkpoint is 177 GB and two are kept. On a machine without the hub, give a folder: --config.model.path=FOLDER.

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
    16 updates per iteration, as in DAPO (arXiv 2503.14476); Klear-Reasoner took 8
    responses of up to 16384 tokens; DAPO's 32B run took 20K, Klear-Reasoner 32K (and found 16K unstable)
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
        name="qwen_14b",
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
        rollout=RolloutConfig(prompts=128, group_size=8, max_prompt=2048, max_response=16384),
        reward=RewardConfig(extract="boxed", workers=16),
        loss=LossConfig(method="dgpo", n=1.0, m=2.0),
        update=UpdateConfig(updates=16, tokens_per_row=18432, tokens_per_device=18432, logprob_chunk=1024),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=10, weight_decay=0.1, clip_norm=1.0),
        eval=EvalConfig(every=10, problems=30, samples=32, temperature=0.6),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )  # fmt: skip
