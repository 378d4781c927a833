"""DeepSeek-R1-Distill-Qwen-1.5B, or a run of configs/qwen_1p5b.py, on the six sets of the DGPO paper, GSM8K and HMMT.

    python -m dgpo_jax.evaluate --config=configs/eval_qwen_1p5b.py
    python -m dgpo_jax.evaluate --config=configs/eval_qwen_1p5b.py --checkpoint=runs/qwen_1p5b-HASH

Not run yet: these settings have been loaded, not sampled with, so no score is promised.

32 samples of 2896 problems are 92,672 responses of up to 8192 tokens. The small sets, 130 problems, first:
--config.eval.sets=aime24,aime25,amc23,hmmt25. The paper states 32 samples, and neither temperature nor top-p nor
length; 0.6 and 0.95 are what the model's card recommends, 8192 tokens what configs/qwen_1p5b.py trains with. DeepSeek
evaluated with 32768, and warns of endless repetition at low temperatures, so there is no greedy round.
"""

from dgpo_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
)


def get_config() -> Config:
    """The settings of the evaluation; the command line can change any of them."""
    return Config(
        name="eval_qwen_1p5b",
        model=ModelConfig(path="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
        mesh=MeshConfig(data=-1),
        data=DataConfig(
            held_out="", too_long="drop",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        rollout=RolloutConfig(max_prompt=2048, max_response=8192),
        reward=RewardConfig(extract="boxed", workers=16),
        update=UpdateConfig(tokens_per_row=10240, tokens_per_device=10240),
        eval=EvalConfig(sets="all", problems=0, samples=32, temperature=0.6, top_p=0.95, responses=512, greedy=False),
    )  # fmt: skip
