"""Text in, text out, on the golden models and a tokenizer of as many words."""

from pathlib import Path

import numpy as np
import pytest

from dgpo_jax.data.tokenizers import Tokenizer
from dgpo_jax.generate import PROMPT_BLOCK, generate, pad_prompts
from dgpo_jax.models import load_pretrained

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ["one two", "three four five six", "seven"]


@pytest.fixture(scope="module")
def inner():
    """A transformers tokenizer of 64 tokens, one a word, for models with a vocabulary of 64."""
    from tokenizers import Tokenizer as Pieces
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unknown>", "one", "two", "three", "four", "five", "six", "seven"]
    words += [f"word{number}" for number in range(len(words), 64)]
    pieces = Pieces(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


@pytest.fixture(scope="module")
def model():
    """(model, params) of a folder as transformers writes it."""
    return load_pretrained(GOLDEN / "qwen2_tied")


def test_every_prompt_gets_its_group_of_responses(model, inner):
    answers = generate(*model, inner, PROMPTS, group_size=2, max_response=6)
    assert [len(group) for group in answers] == [2, 2, 2]
    for response in (response for group in answers for response in group):
        assert 1 <= len(response.tokens) <= 6 and len(response.logprobs) == len(response.tokens)
        assert all(logprob <= 0 for logprob in response.logprobs)
        # It ends with the stop token, id 1, or has run out of room.
        assert response.truncated == (response.tokens[-1] != 1) and 1 not in response.tokens[:-1]
        assert not response.truncated or len(response.tokens) == 6
        assert "<" not in response.text.replace("<unknown>", "")  # special tokens are left out
    assert answers[0][0].tokens != answers[0][1].tokens  # two draws of 64 words, six times


def test_greedy_is_the_same_for_any_seed_and_every_sample(model, inner):
    first = generate(*model, inner, PROMPTS, group_size=2, max_response=6, temperature=0.0, seed=0)
    assert first == generate(*model, inner, PROMPTS, group_size=2, max_response=6, temperature=0.0, seed=1)
    assert all(one == other for one, other in first)


def test_greedy_takes_the_likeliest_token_after_the_prompt(model, inner):
    network, params = model
    response = generate(network, params, inner, ["one two"], max_response=1, temperature=0.0)[0][0]
    logits = np.asarray(network.logits(params, np.array([inner.encode("one two")], np.int32)))[0, -1]
    assert response.tokens == [int(logits.argmax())]
    shifted = logits - logits.max()
    assert response.logprobs == pytest.approx([-np.log(np.exp(shifted).sum())], abs=1e-4)


def test_the_seed_decides(model, inner):
    def sample(seed):
        return generate(*model, inner, PROMPTS, group_size=2, max_response=6, seed=seed)

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_a_prompts_responses_do_not_depend_on_the_prompts_behind_it(model, inner):
    together = generate(*model, inner, PROMPTS, max_response=6)
    alone = generate(*model, inner, PROMPTS[:1], max_response=6)
    assert together[0][0].tokens == alone[0][0].tokens


def test_our_tokenizers_and_those_of_transformers_are_accepted(model, inner):
    ours = Tokenizer(inner, "ours")
    assert generate(*model, ours, PROMPTS, max_response=6) == generate(*model, inner, PROMPTS, max_response=6)


@pytest.mark.parametrize("prompts", [[], [""], ["one", ""]])
def test_no_prompt_and_an_empty_prompt_are_refused(prompts, model, inner):
    with pytest.raises(ValueError, match=rf"prompts hold {len(prompts)} texts.*at least a word"):
        generate(*model, inner, prompts)


def test_prompts_are_padded_on_the_left_to_whole_blocks():
    prompts = pad_prompts([[5], [6, 7]], pad_id=9)
    assert prompts.tokens.shape == (2, PROMPT_BLOCK)
    assert prompts.tokens[:, -3:].tolist() == [[9, 9, 5], [9, 6, 7]]
    assert prompts.mask[:, -3:].tolist() == [[False, False, True], [False, True, True]]
    # One token more than a block takes a second one.
    assert pad_prompts([[1] * (PROMPT_BLOCK + 1)], 0).tokens.shape == (1, 2 * PROMPT_BLOCK)


@pytest.mark.parametrize("folder", ["llama", "qwen3"])
def test_folders_of_other_families_generate_too(folder, inner):
    response = generate(*load_pretrained(GOLDEN / folder), inner, ["one two"], max_response=3)[0][0]
    assert 1 <= len(response.tokens) <= 3
