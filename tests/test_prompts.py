"""Tokenizers, templates and padding."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dgpo_jax.data.generated import GeneratedProblems
from dgpo_jax.data.prompts import Template, encode_examples, encode_prompts, fit_prompts
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.types import Problem

SUM = Problem("sum", "9 + 8 = ?", "17", "test", r"\boxed{17}")
LONG = Problem("long", "9 + 8 + 1 + 2 = ?", "20", "test")


@pytest.fixture(scope="module")
def words():
    return load_tokenizer("builtin:words")


@pytest.fixture
def make_folder(words, tmp_path):
    """Saves the built-in tokenizer with another chat template and generation_config.json, and loads the folder."""

    def make(chat_template=None, stops=None):
        words.save(tmp_path)
        for file in tmp_path.glob("chat_template*"):
            file.unlink()
        file = tmp_path / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config["chat_template"] = chat_template or words.inner.chat_template
        file.write_text(json.dumps(config))
        if stops is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return load_tokenizer(str(tmp_path))

    return make


def pieces(tokenizer, ids):
    return tokenizer.inner.convert_ids_to_tokens(ids)


def test_the_built_in_tokenizer_gives_back_every_generated_text(words):
    for problem in [*GeneratedProblems("arithmetic", 500), *GeneratedProblems("words", 200)]:
        for text in (problem.problem, problem.solution):
            assert words.decode(words.encode(text)) == text == words.decode(words.encode(text), skip_special=True)


@pytest.mark.parametrize("text", ["  two  spaces\n\nx = \\boxed{ 3 }", r"\boxed", "12345", " 1", "a+b=-3", "<|im", ""])
def test_the_built_in_tokenizer_gives_back_any_ascii_text(words, text):
    assert words.decode(words.encode(text)) == text


def test_digits_and_boxed_are_tokens_of_their_own_and_words_whole(words):
    assert pieces(words, words.encode(r"tom has 19 pens. 9 + 8 = \boxed{17}")) == [
        *("tom", " has", " ", "1", "9", " pens", ".", " ", "9", " +", " ", "8", " =", r" \boxed{", "1", "7", "}"),
    ]
    assert words.vocab_size <= 256
    assert words.pad_id not in words.stop_ids


def test_a_chat_ends_where_the_response_starts(words):
    ids = words.chat("9 + 8 = ?", "add")
    assert words.decode(ids) == (
        "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n9 + 8 = ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pieces(words, ids)[-3:] == ["<|im_start|>", "assistant", "\n"]
    assert words.decode(ids, skip_special=True) == "system\nadd\nuser\n9 + 8 = ?\nassistant\n"


def test_a_saved_tokenizer_loads_as_the_same(words, make_folder):
    loaded = make_folder()
    text = r"tom has 19 pens. \boxed{17}"
    assert loaded.chat(text) == words.chat(text) and loaded.encode(text) == words.encode(text)
    assert (loaded.pad_id, loaded.stop_ids, loaded.vocab_size) == (words.pad_id, words.stop_ids, words.vocab_size)


def test_stop_ids_come_from_eos_the_turn_marker_and_generation_config(words, make_folder):
    turn_end, end_of_text = words.inner.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert words.stop_ids == (turn_end,)
    assert make_folder(stops=[end_of_text, turn_end]).stop_ids == (turn_end, end_of_text)
    assert make_folder(stops=end_of_text).stop_ids == (turn_end, end_of_text)


@pytest.mark.parametrize(
    "path, message",
    [
        ("builtin:word", "the only built-in one is builtin:words"),
        ("/no/such/folder", "'/no/such/folder': no such folder"),
        ("", "no such folder"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json and tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template, expected",
    [
        (Template("plain"), "9 + 8 = ?\n"),
        (Template("plain", system="add", instruction=r"use \boxed{}."), "add\n9 + 8 = ?\nuse \\boxed{}.\n"),
        (Template(r"Q: {problem} in \boxed{} A:"), r"Q: 9 + 8 = ? in \boxed{} A:"),  # other braces are text
        (Template("Q: {problem}", instruction="sum"), "Q: 9 + 8 = ?\nsum"),
        (Template("{problem}<think>\n"), "9 + 8 = ?<think>\n"),  # the newline at the end counts
        (Template(instruction="sum"), "<|im_start|>user\n9 + 8 = ?\nsum<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_template_renders_to_the_letter(words, template, expected):
    assert template.render(SUM.problem, words) == expected
    assert words.decode(template.encode(SUM.problem, words)) == expected


@pytest.mark.parametrize("arguments", [("chatt",), ("Solve:",), ("Q: {problem}", "system")])
def test_an_impossible_template_is_refused(arguments):
    with pytest.raises(ValueError, match="template"):
        Template(*arguments)


def test_a_chat_template_that_opens_think_is_neither_doubled_nor_lost(make_folder):
    opening = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    tokenizer = make_folder(chat_template=opening)
    assert Template().render("sum?", tokenizer) == "sum?<|im_start|><think>\n"
    for solution in ("<think>\nadd</think>17", "add</think>17"):
        (prompt, response), = encode_examples([SUM._replace(solution=solution)], tokenizer, Template(), 64, 64)
        assert tokenizer.decode(prompt + response).count("<think>") == 1
        assert tokenizer.decode(response, skip_special=True) == "add</think>17"


@pytest.mark.parametrize("template, opening", [
    (Template("{problem}<think>\n"), "<think>"),  # as R1-Distill's chat template ends
    (Template("{problem}<think>"), "<think>"),
    (Template("{problem}<think>\n \n"), "<think>"),  # blanks behind it do not close it
    (Template("{problem}"), ""),
    (Template("plain"), ""),
    (Template(), ""),
    (Template("think in <think> tags: {problem}"), ""),  # spoken of, not opened
    (Template("{problem}<think></think>\n"), ""),  # opened and closed again
])  # fmt: skip
def test_an_opening_is_what_the_prompt_has_begun_of_the_response(words, template, opening):
    assert template.opening(SUM.problem, words) == opening


def test_a_chat_template_has_an_opening_too_and_a_problem_about_tags_has_none(words, make_folder):
    opens = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    assert Template().opening("sum?", make_folder(chat_template=opens)) == "<think>"
    assert Template().opening("what does this mean: <think>", words) == ""  # the turn marker comes after it


def test_a_tokenizer_without_chat_template_says_what_to_use(make_folder):
    tokenizer = make_folder()
    tokenizer.inner.chat_template = None
    with pytest.raises(ValueError, match="use 'plain'"):
        Template().encode("x", tokenizer)
    assert tokenizer.turn_end == tokenizer.inner.eos_token_id


def test_text_prompts_start_as_the_tokenizer_starts_a_text_and_chats_do_not(make_folder):
    from tokenizers import processors

    tokenizer = make_folder()
    bos = tokenizer.inner.bos_token_id
    tokenizer.inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert Template("plain").encode("x", tokenizer)[0] == bos
    assert bos not in Template().encode("x", tokenizer)  # a chat template writes its own


def test_prompts_are_padded_on_the_left(words):
    prompts = encode_prompts([SUM, LONG], words, Template("plain"), max_prompt=20)
    short, long = words.encode("9 + 8 = ?\n"), words.encode("9 + 8 + 1 + 2 = ?\n")
    assert (len(short), len(long)) == (8, 14)  # 9 _+ _ 8 _= _ ? newline, and two times _+ _ digit
    assert prompts.tokens.dtype == np.int32 and prompts.mask.dtype == bool
    np.testing.assert_array_equal(prompts.tokens, [[0] * 12 + short, [0] * 6 + long])
    np.testing.assert_array_equal(prompts.mask, [[False] * 12 + [True] * 8, [False] * 6 + [True] * 14])


def test_a_prompt_may_fill_every_slot_but_not_one_more(words):
    length = len(Template("plain").encode(LONG.problem, words))
    assert encode_prompts([LONG], words, Template("plain"), length).mask.all()
    with pytest.raises(ValueError, match=f"problem long: its prompt has {length} tokens, more than max_prompt {length - 1}"):
        encode_prompts([LONG], words, Template("plain"), length - 1)


def test_long_prompts_are_dropped_and_counted_or_refused(words):
    template, problems = Template("plain"), [SUM, LONG, SUM]
    limit = len(template.encode(SUM.problem, words))
    assert fit_prompts(problems, words, template, limit, "drop") == ([SUM, SUM], 1)
    assert fit_prompts(problems, words, template, 50, "drop")[0] is problems  # nothing to drop: stays lazy
    with pytest.raises(ValueError, match="problem long: its prompt has"):
        fit_prompts(problems, words, template, limit, "error")
    with pytest.raises(ValueError, match="all 3 problems are longer than max_prompt 2"):
        fit_prompts(problems, words, template, 2, "drop")
    with pytest.raises(ValueError, match="'cut' is not 'error' or 'drop'"):
        fit_prompts(problems, words, template, 50, "cut")


def test_an_example_is_the_prompt_and_the_solution_with_its_stop_token(words):
    (prompt, response), = encode_examples([SUM], words, Template(), 64, 8)
    assert prompt == words.chat(SUM.problem)
    assert pieces(words, response) == [r"\boxed{", "1", "7", "}", "<|im_end|>"]


@pytest.mark.parametrize(
    "problem, max_response, message",
    [(LONG, 9, "problem long has no solution"), (SUM, 4, "its solution has 5 tokens, more than max_response 4")],
)
def test_an_example_that_cannot_be_trained_on_is_refused(words, problem, max_response, message):
    with pytest.raises(ValueError, match=message):
        encode_examples([problem], words, Template(), 64, max_response)


def test_reading_problems_and_prompts_imports_no_device_code_and_no_transformers():
    script = (
        "import sys; from dgpo_jax.data import generated, problems, prompts, tokenizers\n"
        "problems.load_problems('generated:words')[0]\n"
        "print([m for m in ('jax', 'flax', 'tensorflow', 'transformers', 'torch') if m in sys.modules])\n"
        "tokenizers.load_tokenizer('builtin:words').chat('x')\n"
        "print([m for m in ('jax', 'flax', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
