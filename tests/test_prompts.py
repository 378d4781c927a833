"""Tokenizers, templates and padding."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from dgpo_jax.data.generated import GeneratedProblems
from dgpo_jax.data.prompts import BOXED, Template, encode_examples, encode_prompts, fit
from dgpo_jax.data.tokenizers import Tokenizer, load_tokenizer
from dgpo_jax.types import Problem

SUM = Problem("sum", "9 + 8 = ?", "17", "test", r"\boxed{17}")
LONG = Problem("long", "9 + 8 + 1 + 2 = ?", "20", "test")

# Published chat templates, word for word but for the branches on tools, which a question without tools does not enter.
R1_DISTILL = (  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, tokenizer_config.json
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
QWEN_MATH = r"""{%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n' }}
    {%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # Qwen/Qwen2.5-Math-1.5B, tokenizer_config.json
QWEN3 = r"""{%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # Qwen/Qwen3-0.6B, tokenizer_config.json
QWEN3_WITHOUT_THOUGHT = "{%- set enable_thinking = false %}" + QWEN3  # what apply_chat_template(enable_thinking=False) renders


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


def make_tokenizer(chat_template, tokens, bos=None):
    """The built-in tokenizer with more tokens, and with a `bos` that it puts before each text, as R1's and Llama's do."""
    from tokenizers import processors

    inner = load_tokenizer("builtin:words").inner
    inner.add_special_tokens({"additional_special_tokens": tokens})
    inner.add_tokens(["<think>", "</think>"])  # tokens, but no special ones, in R1-Distill and Qwen3 alike
    inner.chat_template = chat_template
    if bos:
        inner.bos_token = bos
        inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.bos_token_id)]
        )
    return Tokenizer(inner, "test")


@pytest.fixture(scope="module")
def r1():
    begin = "<｜begin▁of▁sentence｜>"
    return make_tokenizer(R1_DISTILL, [begin, "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], bos=begin)


@pytest.fixture(scope="module")
def qwen_math():
    return make_tokenizer(QWEN_MATH, [])


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


def test_a_model_without_its_tokenizer_files_is_refused_and_not_trained_on_empty_prompts(tmp_path):
    # Of the name in config.json alone transformers 5 makes a Qwen2Tokenizer of one token, to which every text is [].
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    with pytest.raises(ValueError, match=r"It has no tokenizer\.json and no tokenizer_config\.json\..*'1 \+ 2' has no tokens") as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer_config.json", "3", "cannot be loaded"),  # transformers: AttributeError
    ("tokenizer_config.json", '{"model_max_length": "many"}', "cannot be loaded"),  # loads; TypeError at the first text
    ("tokenizer.json", '{"version": "1.0", "padding": "x"}', "cannot be loaded"),  # tokenizers: a bare Exception
    ("generation_config.json", "{", "generation_config.json: cannot be read"),
    ("generation_config.json", "[]", r"holds \[\] and no object; download it again, or delete it"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'; it must be a token's id or a list"),
    ("generation_config.json", '{"eos_token_id": [[2]]}', r"eos_token_id is \[\[2\]\]; it must be a token's id or a list"),
])  # fmt: skip
def test_a_folder_with_a_damaged_tokenizer_is_refused_whatever_its_readers_raise(words, tmp_path, file, content, message):
    words.save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("template, message", [
    ("{% if %}", "TemplateSyntaxError"), ("{{ messages[5].content }}", "UndefinedError"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('no\nsystem') }}", "no system"),
])  # fmt: skip
def test_a_chat_template_that_fails_is_refused_in_one_line(make_folder, template, message):
    with pytest.raises(ValueError, match=f"its chat template fails .*{message}.*; correct chat_template") as error:
        Template().encode("9 + 8 = ?", make_folder(template))
    assert len(str(error.value).splitlines()) == 1


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


@pytest.mark.parametrize("system, instruction", [("", ""), ("add", ""), ("", "sum"), ("add", "sum")])
def test_the_r1_form_is_what_r1s_own_chat_template_renders(r1, system, instruction):
    theirs = Template("chat", system, instruction or BOXED)  # the instruction that its authors advise
    ours = Template("r1", system, instruction)
    assert ours.render(SUM.problem, r1) == theirs.render(SUM.problem, r1)
    assert ours.encode(SUM.problem, r1) == theirs.encode(SUM.problem, r1)


def test_the_r1_form_to_the_letter(r1):
    assert Template("r1").render("9?", r1) == (
        "<｜begin▁of▁sentence｜><｜User｜>9?\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n"
    )
    assert Template("r1", "add", "sum").render("9?", r1) == "<｜begin▁of▁sentence｜>add<｜User｜>9?\nsum<｜Assistant｜><think>\n"


@pytest.mark.parametrize("system", ["", "add"])
def test_the_qwen_math_form_is_what_its_own_chat_template_renders(qwen_math, system):
    ours, theirs = Template("qwen_math", system), Template("chat", system)
    assert ours.render(SUM.problem, qwen_math) == theirs.render(SUM.problem, qwen_math)


def test_the_qwen_math_form_to_the_letter_works_with_any_tokenizer_that_has_its_tokens(words):
    assert Template("qwen_math", instruction="sum").render("9?", words) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n9?\nsum<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("problem", ["{system} and {problem}?", "{}", "\\boxed{}"])
def test_braces_in_a_problem_stand_for_themselves(qwen_math, problem):
    text = Template("qwen_math", system="add").render(problem, qwen_math)
    assert text == f"<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    assert Template("Q: {problem} {system}").render(problem, qwen_math) == f"Q: {problem} {{system}}"


@pytest.mark.parametrize("template", [
    Template("r1"),  # writes the marker
    Template("chat"),  # so does its chat template
    Template("plain"),  # does not, and the tokenizer puts it there
    Template("<｜begin▁of▁sentence｜>{problem}"),  # written by hand
])  # fmt: skip
def test_a_prompt_begins_with_the_marker_of_a_text_exactly_once(r1, template):
    assert r1.text_start == [r1.inner.bos_token_id]
    ids = template.encode(SUM.problem, r1)
    assert ids[0] == r1.inner.bos_token_id and ids.count(ids[0]) == 1


@pytest.mark.parametrize("form, begin", [("r1", "<｜begin▁of▁sentence｜>"), ("qwen_math", "<|im_start|>")])
def test_a_form_that_begins_a_text_its_own_way_gets_no_other_beginning(form, begin):
    other = make_tokenizer(QWEN3, ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], bos="<|endoftext|>")
    assert pieces(other, Template("plain").encode("9?", other))[0] == "<|endoftext|>"
    assert pieces(other, Template(form).encode("9?", other))[0] == begin


def test_a_form_whose_tokens_the_tokenizer_lacks_is_refused_by_name(words, r1):
    missing = "<｜begin▁of▁sentence｜>, <｜User｜>, <｜Assistant｜>, <think>"
    with pytest.raises(ValueError, match=f"'r1' needs {missing}, which the tokenizer builtin:words"):
        Template("r1").render("9?", words)
    without_think = make_tokenizer(R1_DISTILL, ["<｜begin▁of▁sentence｜>", "<｜User｜>"])
    with pytest.raises(ValueError, match="'r1' needs <｜Assistant｜>, which the tokenizer test"):
        Template("r1").encode("9?", without_think)


def test_a_misspelt_form_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match=r"none of chat, plain, r1, qwen_math and lacks .problem.; perhaps it is 'qwen_math'"):
        Template("qwen-math")


@pytest.mark.parametrize("solution, response", [
    ("<think>\nadd</think>17", "add</think>17"),  # opened by the prompt already
    ("<think>add</think>17", "add</think>17"),
    ("\n<think>\nadd</think>17", "add</think>17"),
    ("add</think>17", "add</think>17"),  # written for such a prompt
    ("17", "\n</think>\n\n17"),  # no thought: the block is closed, or the answer would stand inside it
])  # fmt: skip
@pytest.mark.parametrize("form", ["r1", "chat"])
def test_a_prompt_that_opens_think_and_its_solution_make_one_block(r1, form, solution, response):
    template = Template(form)
    assert template.opening(SUM.problem, r1) == "<think>"
    (prompt, ids), = encode_examples([SUM._replace(solution=solution)], r1, template, 256, 64)
    assert r1.decode(ids[:-1]) == response
    assert pieces(r1, prompt + ids).count("<think>") == pieces(r1, prompt + ids).count("</think>") == 1


@pytest.mark.parametrize("chat_template, solution, response", [
    (QWEN3, "<think>\nadd\n</think>\n\n17", "<think>\nadd\n</think>\n\n17"),  # the model opens it itself
    (QWEN3, "17", "17"),
    (QWEN3_WITHOUT_THOUGHT, "17", "17"),
    (QWEN3_WITHOUT_THOUGHT, "<think>\nadd\n</think>\n\n17", "17"),  # the prompt has its one, empty block
])  # fmt: skip
def test_qwen3s_block_of_thought_is_there_at_most_once(chat_template, solution, response):
    tokenizer = make_tokenizer(chat_template, [])
    assert Template().opening(SUM.problem, tokenizer) == ""
    (prompt, ids), = encode_examples([SUM._replace(solution=solution)], tokenizer, Template(), 64, 64)
    assert tokenizer.decode(ids[:-1]) == response
    thoughts = pieces(tokenizer, prompt + ids).count("<think>")
    assert thoughts == pieces(tokenizer, prompt + ids).count("</think>") == (solution != "17" or "false" in chat_template[:40])


def test_a_prompt_is_rendered_once_however_often_it_is_looked_at(monkeypatch):
    rendered, render_chat = [], Tokenizer.render_chat
    monkeypatch.setattr(Tokenizer, "render_chat", lambda self, *a: rendered.append(a) or render_chat(self, *a))
    tokenizer, template = make_tokenizer(QWEN3, []), Template()
    encode_prompts([SUM, LONG], tokenizer, template, 64)
    encode_examples([SUM], tokenizer, template, 64, 64)
    assert template.opening(SUM.problem, tokenizer) == "" and len(rendered) == 2  # SUM and LONG
    assert Template(system="add").render(SUM.problem, tokenizer) != template.render(SUM.problem, tokenizer)
    assert template.render(SUM.problem, make_tokenizer(QWEN_MATH, [])) != template.render(SUM.problem, tokenizer)


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
    assert fit(problems, words, template, limit, "drop")[:2] == ([SUM, SUM], 1)
    assert fit(problems, words, template, 50, "drop")[0] is problems  # nothing to drop: stays lazy
    with pytest.raises(ValueError, match="problem long: its prompt has"):
        fit(problems, words, template, limit, "error")
    with pytest.raises(ValueError, match="all 3 problems are longer than max_prompt 2"):
        fit(problems, words, template, 2, "drop")
    with pytest.raises(ValueError, match="'shorten' is not 'error', 'drop' or 'cut'"):
        fit(problems, words, template, 50, "shorten")


@pytest.mark.parametrize("policy", ["error", "drop", "cut"])
def test_a_prompt_without_a_token_is_refused_by_its_id(make_folder, policy):
    tokenizer = make_folder("{% if messages[0]['content'] != '' %}{% endif %}")
    with pytest.raises(ValueError, match=r"problem .*: its prompt has no tokens, .*; correct the chat template of the tokenizer .*, or name another data\.template"):
        fit([SUM], tokenizer, Template(), 50, policy)


STORY = Problem("story", "Tom has 12 apples. He buys 345 more. How many apples?", "357", "test")
FRAMED = Template("chat", system="Be brief.", instruction="Mark it.")


def frame(words):
    """What stands before and behind the problem in a prompt of FRAMED."""
    return FRAMED.render("@", words).split("@")


@pytest.mark.parametrize("room, end", [
    (26, STORY.problem),  # T o m _has _ 1 2 _apples . _ H e _buys _ 3 4 5 _more . _ H o w _many _apples ?
    (22, "12 apples. He buys 345 more. How many apples?"),  # the blank before it would fit too
    (21, "12 apples. He buys 345 more. How many apples?"),
    (20, "apples. He buys 345 more. How many apples?"),  # the 2 of 12 would fit: another number
    (12, "345 more. How many apples?"),
    (11, "more. How many apples?"),
    (1, "?"),  # the last word is all there is: then a part of it
])
def test_a_problem_that_is_too_long_loses_its_beginning_and_no_part_of_the_template(words, room, end):
    before, behind = frame(words)
    limit = len(words.encode(before + behind)) + room
    fitted = fit([STORY, SUM] if room > 8 else [STORY], words, FRAMED, limit, "cut")
    assert FRAMED.render(fitted.problems[0].problem, words) == before + end + behind
    assert len(FRAMED.encode(fitted.problems[0].problem, words)) <= limit
    assert (fitted.dropped, fitted.cut) == (0, int(end != STORY.problem))
    assert fitted.problems[0]._replace(problem=STORY.problem) == STORY  # id and answer stay: it is judged as before
    assert fitted.problems[1:] in ([], [SUM])  # which fits as it is


def test_nothing_too_long_leaves_the_sequence_as_it_is_under_cut_too(words):
    problems = GeneratedProblems("arithmetic", 20, 0)  # lazy: a list of a million made problems would not be
    assert fit(problems, words, Template("plain"), 50, "cut") == (problems, 0, 0)


def test_a_template_that_leaves_no_room_is_refused_and_not_cut(words):
    taken = len(FRAMED.encode("", words))
    for limit in (taken - 1, taken):  # an empty problem does not fit; it would, and ask nothing
        with pytest.raises(ValueError, match=f"problem story: max_prompt {limit} leaves no room .* takes {taken} tokens; raise max_prompt"):
            fit([STORY], words, FRAMED, limit, "cut")


def test_a_million_characters_are_cut_in_seconds(words):
    problem = STORY._replace(problem="12345 apples and " * 60_000 + "how many?")  # 1,020,009 characters
    began = time.monotonic()
    fitted = fit([problem], words, Template("plain"), 11, "cut")
    assert fitted.problems[0].problem == "12345 apples and how many?"  # 5 digits, 4 words, ? and the newline
    assert time.monotonic() - began < 30  # 1 s measured; a second pass over all of the text for every word would take hours


def test_text_without_blanks_is_cut_at_a_character(words):
    problem = STORY._replace(problem="7" * 1000)
    assert fit([problem], words, Template("plain"), 11, "cut").problems[0].problem == "7" * 10  # and the newline


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
