"""Our side of a comparison: the rollout and the update as `train` calls them, from text to text.

Not run by hand: `against_tunix.py` and others start it; see turns.py.
"""

import jax
import numpy as np
import tiny_model
from turns import Case, serve

from dgpo_jax.build import build_parts, build_programs, build_state, make_decode_params
from dgpo_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig, UpdateConfig
from dgpo_jax.learning import compute_advantages, learn
from dgpo_jax.recipe import resolve
from dgpo_jax.rl.drawing import TRAINING, Draw
from dgpo_jax.rollout import build_sampling, make_rollout
from dgpo_jax.types import Experience, Problem

TOKENS_AT_ONCE = 1024  # of a microbatch, about: the last is filled up with empty rows, and large ones are no faster here


def make_config(case: Case, folder: str) -> Config:
    """GRPO with one optimizer step an iteration, as the peers do it; old log-probabilities are the sampler's.

    Rows are as long as the longest sequence can be.
    """
    row = case.prompt_tokens + case.new_tokens
    return Config(
        model=ModelConfig(path=folder, remat="none", dtype="float32"),
        data=DataConfig(train=f"{folder}/problems.jsonl", held_out="", tokenizer=f"{folder}/tokenizer", template="plain"),
        rollout=RolloutConfig(
            prompts=case.prompts, group_size=max(2, case.samples), max_prompt=case.prompt_tokens, max_response=case.new_tokens,
        ),
        loss=LossConfig(method="grpo"),
        update=UpdateConfig(
            updates=1, tokens_per_row=row, tokens_per_device=row * max(1, min(TOKENS_AT_ONCE // row, case.responses)),
            logprob_chunk=case.prompt_tokens + case.new_tokens, old_logprobs="sampler",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_iterations=0),
    )  # fmt: skip


def prepare(case: Case, folder: str):
    """The function (seed, texts) -> response tokens."""
    config = resolve(make_config(case, folder))
    parts = build_parts(config)
    sampling = build_sampling(parts, config.rollout)._replace(group_size=case.samples)
    rollout, decode_params = make_rollout(parts, sampling, case.prompt_tokens, case.responses), make_decode_params(parts)
    state = build_state(config, parts)

    def sample(params, given):
        seed, texts = given
        problems = [Problem(str(number), text, "", "benchmark") for number, text in enumerate(texts)]
        return rollout(params, problems, Draw(0, TRAINING, seed, 0))

    if case.kind == "sample":
        params = decode_params(state.params)
        return lambda given: int(sample(params, given).rollout.response_mask.sum())

    programs = build_programs(config, parts)

    def iterate(given) -> int:
        nonlocal state
        responses = sample(decode_params(state.params), given)
        rewards = np.array([tiny_model.reward(text) for text in responses.texts], np.float32)
        stamp = np.full(case.prompts, given[0], np.int32)
        experience = Experience(responses.prompts, responses.rollout, responses.rollout.logprobs, rewards, rewards, stamp)
        state, _ = learn(config, parts, programs, state, experience, compute_advantages(config, experience), given[0])
        jax.block_until_ready(state)
        return int(responses.rollout.response_mask.sum())

    return iterate


if __name__ == "__main__":
    serve(prepare, lambda case, seed: (seed + 1, tiny_model.prompts(case, seed)))
