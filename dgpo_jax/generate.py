"""Text in, text out, for notebooks and a quick look at a model.

    model, params = load_pretrained("models/smollm2")
    generate(model, params, load_tokenizer("models/smollm2"), ["2+2="], group_size=4)
"""

import functools
from typing import NamedTuple

import numpy as np

from dgpo_jax.data.tokenizers import Tokenizer
from dgpo_jax.rl.drawing import EVALUATION, Draw, Sampling
from dgpo_jax.rl.sampler import make_sampler
from dgpo_jax.types import Prompts

PROMPT_BLOCK = 64  # prompt slots come in multiples of this, so that similar prompts share a compiled program


class Response(NamedTuple):
    """One sampled continuation."""

    text: str  # special tokens left out
    tokens: list[int]  # the stop token included
    logprobs: list[float]  # of log_softmax(logits / temperature)
    truncated: bool  # True = max_response tokens without a stop token


def generate(
    model, params, tokenizer, prompts, *, group_size=1, max_response=64, temperature=1.0, top_p=1.0, top_k=0, seed=0
) -> list[list[Response]]:
    """Samples continuations of texts.

    Args:
        model, params: from `dgpo_jax.models.load_pretrained`.
        tokenizer: from `dgpo_jax.data.tokenizers.load_tokenizer`, or one of transformers'.
        prompts: texts, continued as they are; for a chat use `tokenizer.render_chat(problem)`.
        group_size: responses per prompt.
        max_response: tokens, the stop token included.
        temperature: 0 = greedy.
        seed: the same seed gives the same responses.
    Returns:
        For each prompt its group_size responses.
    Raises:
        ValueError: no prompts, or an empty one.
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer, "tokenizer")
    padded = pad_prompts([[*tokenizer.text_start, *tokenizer.encode(text)] for text in prompts], tokenizer.pad_id)
    sampling = Sampling(group_size, max_response, tokenizer.stop_ids, tokenizer.pad_id, temperature, top_p, top_k)
    sampler = _sampler(model, sampling, len(prompts) * group_size, padded.tokens.shape[1])
    rollout = sampler(model.cast(params), padded, Draw(seed, EVALUATION, 0, 0)).rollout
    responses = [
        Response(
            tokenizer.decode(rollout.response[row][mask], skip_special=True),
            rollout.response[row][mask].tolist(),
            rollout.logprobs[row][mask].tolist(),
            bool(rollout.truncated[row]),
        )
        for row, mask in enumerate(rollout.response_mask)
    ]
    return [responses[start : start + group_size] for start in range(0, len(responses), group_size)]


@functools.lru_cache(maxsize=8)
def _sampler(model, sampling: Sampling, slots: int, max_prompt: int):
    return make_sampler(model, sampling, slots=slots, max_prompt=max_prompt)


def pad_prompts(encoded: list[list[int]], pad_id: int) -> Prompts:
    """Pads on the left to the longest prompt, rounded up to PROMPT_BLOCK slots."""
    if not encoded or not all(encoded):
        raise ValueError(f"prompts hold {len(encoded)} texts, one of them empty or none at all; give at least a word each.")
    slots = -(-max(map(len, encoded)) // PROMPT_BLOCK) * PROMPT_BLOCK
    tokens = np.full((len(encoded), slots), pad_id, np.int32)
    mask = np.zeros((len(encoded), slots), bool)
    for row, ids in enumerate(encoded):
        tokens[row, slots - len(ids) :] = ids
        mask[row, slots - len(ids) :] = True
    return Prompts(tokens, mask)
