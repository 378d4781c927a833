"""Problems to prompt tokens: templates, the length limit, and padding on the left."""

from dataclasses import dataclass

import numpy as np

from dgpo_jax.types import Prompts

THINK = "<think>"


@dataclass(frozen=True)
class Template:
    """How a problem becomes the text that the model continues.

    form: "chat" (the tokenizer's chat template), "plain" (the text and a newline), or a text of your own that holds
        `{problem}` once or more; other braces in it, as in \\boxed{}, stand for themselves.
    system: system prompt for "chat", a first line for "plain"; "" means none.
    instruction: put after the problem, on a line of its own, e.g. "Put your final answer in \\boxed{}."; "" means none.
    """

    form: str = "chat"
    system: str = ""
    instruction: str = ""

    def __post_init__(self):
        if self.form not in ("chat", "plain") and "{problem}" not in self.form:
            raise ValueError(f"template {self.form!r} is neither 'chat' nor 'plain' and lacks {{problem}}; add it.")
        if self.form not in ("chat", "plain") and self.system:
            raise ValueError("a template of your own takes no system prompt; write it into the template.")

    def render(self, problem: str, tokenizer) -> str:
        """The prompt as text, kept to the letter: a template that opens `<think>` keeps it, once."""
        question = f"{problem}\n{self.instruction}" if self.instruction else problem
        if self.form == "chat":
            return tokenizer.render_chat(question, self.system)
        if self.form == "plain":
            return f"{self.system}\n{question}\n" if self.system else f"{question}\n"
        return self.form.replace("{problem}", question)

    def opening(self, problem: str, tokenizer) -> str:
        """What the prompt has begun of the response: "<think>", or nothing."""
        return THINK if self.render(problem, tokenizer).rstrip().endswith(THINK) else ""

    def encode(self, problem: str, tokenizer) -> list[int]:
        """The prompt as ids. A chat template writes its own beginning-of-text marker, the other forms get the usual."""
        ids = tokenizer.encode(self.render(problem, tokenizer))
        return ids if self.form == "chat" else [*tokenizer.text_start, *ids]


def encode_prompts(problems, tokenizer, template: Template, max_prompt: int) -> Prompts:
    """Encodes Q problems into P = max_prompt slots, padded on the left.

    Returns:
        Prompts of numpy arrays: tokens i32[Q, P], mask bool[Q, P].
    Raises:
        ValueError: a prompt longer than max_prompt; `fit_prompts` at load time keeps that from happening mid-run.
    """
    tokens = np.full((len(problems), max_prompt), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), max_prompt), bool)
    for row, problem in enumerate(problems):
        ids = template.encode(problem.problem, tokenizer)
        _check_length(problem, ids, max_prompt)
        tokens[row, max_prompt - len(ids) :] = ids
        mask[row, max_prompt - len(ids) :] = True
    return Prompts(tokens, mask)


def fit_prompts(problems, tokenizer, template: Template, max_prompt: int, policy: str = "error"):
    """Finds prompts that do not fit, once, before the run starts.

    Args:
        problems: any sequence of Problem.
        policy: "error" refuses the first one that is too long; "drop" leaves such problems out.
    Returns:
        (problems that fit, number dropped); the very same sequence if all fit.
    Raises:
        ValueError: too long under "error", nothing left under "drop", or another policy.
    """
    if policy not in ("error", "drop"):
        raise ValueError(f"policy for long prompts {policy!r} is not 'error' or 'drop'; choose one.")
    kept = []
    for problem in problems:
        ids = template.encode(problem.problem, tokenizer)
        if policy == "error":
            _check_length(problem, ids, max_prompt)
        if len(ids) <= max_prompt:
            kept.append(problem)
    dropped = len(problems) - len(kept)
    if not kept:
        raise ValueError(f"all {dropped} problems are longer than max_prompt {max_prompt} tokens; raise max_prompt.")
    return (kept, dropped) if dropped else (problems, 0)


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
        prompt_text = template.render(problem.problem, tokenizer)
        prompt = template.encode(problem.problem, tokenizer)
        _check_length(problem, prompt, max_prompt)
        response = [*tokenizer.encode(_continue(prompt_text, problem.solution)), tokenizer.turn_end]
        if len(response) > max_response:
            raise ValueError(
                f"problem {problem.id}: its solution has {len(response)} tokens, more than max_response"
                f" {max_response}; raise max_response or leave the problem out."
            )
        examples.append((prompt, response))
    return examples


def _continue(prompt_text, solution):
    """Templates such as R1-Distill's have opened `<think>` already; a solution that opens it too must not double it."""
    if prompt_text.rstrip().endswith(THINK) and solution.startswith(THINK):
        solution = solution[len(THINK) :]
        return solution.removeprefix("\n") if prompt_text.endswith("\n") else solution
    return solution


def _check_length(problem, ids, max_prompt):
    if len(ids) > max_prompt:
        raise ValueError(
            f"problem {problem.id}: its prompt has {len(ids)} tokens, more than max_prompt {max_prompt};"
            f" raise max_prompt or drop long prompts."
        )
