"""Problems to prompt tokens: templates, the length limit, and padding on the left."""

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dgpo_jax.types import Problem, Prompts

THINK, THINK_END = "<think>", "</think>"
NO_THOUGHT = f"\n{THINK_END}\n\n"  # closes an opened block with nothing in it, as Qwen3's template writes it
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LONGEST_WORD = 30  # characters; more without a blank are a formula, or a language that has none
RENDERED_KEPT = 4096  # chat texts; an iteration renders each of its prompts to encode it and to see how it ends


class Form(NamedTuple):
    """A prompt written out."""

    text: str  # up to where the response starts, with {system} and {problem}, the instruction included
    system: str = "{system}"  # how a system message is written; where there is none, nothing is
    default_system: str = ""
    default_instruction: str = ""
    tokens: tuple[str, ...] = ()  # in the text; a tokenizer that has not each of them as one token is refused
    starts_text: bool = False  # True = it begins as its model wants; else the tokenizer's beginning of a text is added


# "r1": chat_template of deepseek-ai/DeepSeek-R1-Distill-*, whose authors advise this instruction and no system message.
# "qwen_math": chat_template of Qwen/Qwen2.5-Math-*.
FORMS = {
    "plain": Form("{system}{problem}\n", system="{system}\n"),
    "r1": Form(
        "<｜begin▁of▁sentence｜>{system}<｜User｜>{problem}<｜Assistant｜><think>\n",
        default_instruction=BOXED,
        tokens=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", THINK),
        starts_text=True,
    ),
    "qwen_math": Form(
        "{system}<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        default_system=BOXED,
        tokens=("<|im_start|>", "<|im_end|>"),
        starts_text=True,
    ),
}
CHAT = "chat"  # the tokenizer's own template


@dataclass(frozen=True)
class Template:
    """How a problem becomes the text that the model continues.

    form: "chat" (the tokenizer's chat template), one of FORMS, or a text of your own that holds `{problem}` once or
        more; other braces in it, as in \\boxed{}, stand for themselves.
    system: system message, for "plain" a first line; "" = the form's own default, for "chat" that of the chat template.
    instruction: put after the problem, on a line of its own; "" = the form's own default, which most do not have.
    """

    form: str = CHAT
    system: str = ""
    instruction: str = ""

    def __post_init__(self):
        if self.form == CHAT or self.form in FORMS:
            return
        if "{problem}" not in self.form:
            names = [CHAT, *FORMS]
            near = difflib.get_close_matches(self.form, names, n=1)
            hint = f"perhaps it is {near[0]!r}" if near else "add it"
            raise ValueError(f"template {self.form!r} is none of {', '.join(names)} and lacks {{problem}}; {hint}.")
        if self.system:
            raise ValueError("a template of your own takes no system prompt; write it into the template.")

    def render(self, problem: str, tokenizer) -> str:
        """The prompt as text, kept to the letter: a template that opens `<think>` keeps it, once.

        Raises:
            ValueError: the tokenizer has no chat template, or lacks a token of the form.
        """
        form = self._form()
        instruction, system = self.instruction or form.default_instruction, self.system or form.default_system
        question = f"{problem}\n{instruction}" if instruction else problem
        if self.form == CHAT:
            return _render_chat(tokenizer, question, system)
        if form.tokens:
            _check_tokens(tokenizer, self.form)
        written = form.system.replace("{system}", system) if system else ""
        text = form.text.replace("{system}", written) if self.form in FORMS else form.text
        return text.replace("{problem}", question)

    def _form(self):
        """A text of the user's own is a form without defaults."""
        return FORMS.get(self.form) or Form(self.form)

    def opening(self, problem: str, tokenizer) -> str:
        """What the prompt has begun of the response: "<think>", or nothing."""
        return THINK if self.render(problem, tokenizer).rstrip().endswith(THINK) else ""

    def encode(self, problem: str, tokenizer) -> list[int]:
        """The prompt as ids, with the marker that begins a text once: written by the form, or put before it here."""
        ids = tokenizer.encode(self.render(problem, tokenizer))
        start = [] if self.form == CHAT or self._form().starts_text else tokenizer.text_start
        return ids if ids[: len(start)] == start else [*start, *ids]


@functools.lru_cache(RENDERED_KEPT)
def _render_chat(tokenizer, question, system):
    return tokenizer.render_chat(question, system)


@functools.lru_cache(16)
def _check_tokens(tokenizer, form):
    vocabulary = tokenizer.inner.get_vocab()
    lacking = [token for token in FORMS[form].tokens if tokenizer.encode(token) != [vocabulary.get(token)]]
    if lacking:
        raise ValueError(
            f"template {form!r} needs {', '.join(lacking)}, which the tokenizer {tokenizer.name} does not have as one"
            f" token each; use its own model's form: 'chat', or a text with {{problem}}."
        )


def encode_prompts(problems, tokenizer, template: Template, max_prompt: int) -> Prompts:
    """Encodes Q problems into P = max_prompt slots, padded on the left.

    Returns:
        Prompts of numpy arrays: tokens i32[Q, P], mask bool[Q, P].
    Raises:
        ValueError: a prompt longer than max_prompt; `fit` at load time keeps that from happening mid-run.
    """
    tokens = np.full((len(problems), max_prompt), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), max_prompt), bool)
    for row, problem in enumerate(problems):
        ids = template.encode(problem.problem, tokenizer)
        _check_length(problem, ids, max_prompt)
        tokens[row, max_prompt - len(ids) :] = ids
        mask[row, max_prompt - len(ids) :] = True
    return Prompts(tokens, mask)


class Fitted(NamedTuple):
    """Problems whose prompts fit."""

    problems: Sequence[Problem]  # the very sequence that was given, if all of them fit as they are
    dropped: int  # left out
    cut: int  # among `problems`, without the beginning of their text


def fit(problems: Sequence[Problem], tokenizer, template: Template, max_prompt: int, policy: str = "error") -> Fitted:
    """Finds prompts that do not fit, once, before the run starts.

    Args:
        policy: what is done with a prompt of more than max_prompt tokens: "error" refuses the first one, "drop" leaves such
            problems out, "cut" leaves out the beginning of their text, see `cut_problem`.
    Raises:
        ValueError: too long under "error", nothing left under "drop", no room under "cut", another policy, or a prompt of no token.
    """
    if policy not in ("error", "drop", "cut"):
        raise ValueError(f"policy for long prompts {policy!r} is not 'error', 'drop' or 'cut'; choose one.")
    kept, cut = [], 0
    for problem in problems:
        ids = template.encode(problem.problem, tokenizer)
        _check_not_empty(problem, ids, tokenizer)
        if policy == "error":
            _check_length(problem, ids, max_prompt)
        if len(ids) <= max_prompt:
            kept.append(problem)
        elif policy == "cut":
            kept.append(cut_problem(problem, tokenizer, template, max_prompt))
            cut += 1
    dropped = len(problems) - len(kept)
    if not kept:
        raise ValueError(f"all {dropped} problems are longer than max_prompt {max_prompt} tokens; raise max_prompt.")
    return Fitted(kept if dropped or cut else problems, dropped, cut)


def cut_problem(problem: Problem, tokenizer, template: Template, max_prompt: int) -> Problem:
    """The problem with as much of the end of its text as fits; template, system message and instruction stay whole.

    What is asked usually stands at the end of a problem. No word is cut through where there are words: half of a number is
    another number. Id and answer stay, so that it is judged as the whole problem is.

    Raises:
        ValueError: the template leaves no room for any of it.
    """
    text = problem.problem.rstrip()

    def fits(length):
        return len(template.encode(text[len(text) - length :], tokenizer)) <= max_prompt

    shortest, longest = 0, 1  # the first fits; doubled, so that no text is encoded that is much longer than what will fit
    while longest < len(text) and fits(longest):
        shortest, longest = longest, 2 * longest
    longest = min(longest, len(text))
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        shortest, longest = (middle, longest) if fits(middle) else (shortest, middle - 1)
    end = _whole_words(text, len(text) - shortest)
    if not (end and fits(len(end))):  # a tokenizer may need more tokens for less text
        raise ValueError(
            f"problem {problem.id}: max_prompt {max_prompt} leaves no room for any of its text, the template takes"
            f" {len(template.encode('', tokenizer))} tokens; raise max_prompt or shorten the template."
        )
    return problem._replace(problem=end)


def _whole_words(text, start):
    """text[start:] without the word that it begins in the middle of, and without blanks in front."""
    rest = text[start:]
    if start and not text[start - 1].isspace():
        broken = re.match(rf"\S{{0,{LONGEST_WORD}}}(?=\s)", rest)
        rest = rest[broken.end() :] if broken else rest
    return rest.lstrip()


def encode_examples(problems, tokenizer, template: Template, max_prompt: int, max_response: int):
    """Encodes (prompt, worked solution) pairs for supervised training.

    Returns:
        a list of (prompt ids, response ids); the response ends with the stop token.
    Raises:
        ValueError: a problem without a solution, a prompt or a response that is too long.
    """
    examples = []
    for problem in problems:
        if not problem.solution:
            raise ValueError(f"problem {problem.id} has no solution to train on; add the field or use another source.")
        prompt = template.encode(problem.problem, tokenizer)
        _check_length(problem, prompt, max_prompt)
        response = encode_solution(problem, tokenizer, template)
        if len(response) > max_response:
            raise ValueError(
                f"problem {problem.id}: its solution has {len(response)} tokens, more than max_response"
                f" {max_response}; raise max_response or leave the problem out."
            )
        examples.append((prompt, response))
    return examples


def encode_solution(problem: Problem, tokenizer, template: Template) -> list[int]:
    """The ids of a problem's worked solution as a response to its prompt, the stop token included."""
    prompt_text = template.render(problem.problem, tokenizer)
    return [*tokenizer.encode(_continue(prompt_text, problem.solution)), tokenizer.turn_end]


def _continue(prompt_text, solution):
    """The solution as it goes on from the prompt, so that there is one block of thought, opened once and closed once.

    A prompt may have opened it (R1) where the solution opens it again, or where the solution has no thought: then the
    block is closed at once, because an answer inside it would never be found. Or the prompt has closed an empty one
    (Qwen3 told not to think): then a thought in the solution is left out.
    """
    end, start = prompt_text.rstrip(), solution.lstrip()
    if end.endswith(THINK) and start.startswith(THINK):
        rest = start.removeprefix(THINK)
        return rest.removeprefix("\n") if prompt_text.endswith("\n") else rest
    if end.endswith(THINK) and THINK_END not in solution:
        return NO_THOUGHT + start
    if end.endswith(THINK_END) and start.startswith(THINK):
        return start.partition(THINK_END)[2].lstrip()
    return solution


def _check_not_empty(problem, ids, tokenizer):
    if not ids:
        raise ValueError(
            f"problem {problem.id}: its prompt has no tokens, so there is nothing to answer; correct the chat template of the"
            f" tokenizer {tokenizer.name}, or name another data.template."
        )


def _check_length(problem, ids, max_prompt):
    if len(ids) > max_prompt:
        raise ValueError(
            f"problem {problem.id}: its prompt has {len(ids)} tokens, more than max_prompt {max_prompt};"
            f" raise max_prompt, or leave out or cut such prompts with data.too_long=drop or cut."
        )
