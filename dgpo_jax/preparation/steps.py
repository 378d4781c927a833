"""The steps that make a source of problems into one to train on: each says what it drops, and why.

    kept, step = deduplicate(problems)
    kept, step = decontaminate(kept, {"aime24": ...}, 9)

`dgpo_jax.prepare` calls them in order, `report` writes down what they say.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dgpo_jax.build import build_checkers
from dgpo_jax.config import Config
from dgpo_jax.data.decontamination import BenchmarkIndex
from dgpo_jax.data.deduplication import text_key
from dgpo_jax.data.prompts import Template
from dgpo_jax.data.tokenizers import Tokenizer
from dgpo_jax.rewards.checkers import Checkers
from dgpo_jax.types import Problem

EXAMPLES = 5  # of a step, in the report
PHRASES = 10  # most frequent shared word sequences, in the report
MANNER = "what many share is a manner of speaking, not a leak: raise prepare.ngram if there is much of it"

Advance = Callable[[int], object]  # told how many problems were done, for a progress bar


class Drop(NamedTuple):
    """One problem left out."""

    id: str
    reason: str  # begins in the middle of a sentence: "... was dropped: REASON"


class Step(NamedTuple):
    """What one step did."""

    name: str
    rule: str  # which problems it keeps, with the settings that say so
    before: int  # problems that came in
    drops: list[Drop]  # in the order of the problems
    examples: list[Drop]  # those worth looking at
    tables: dict[str, dict[str, int]]  # title -> what -> how often, among the problems that came in

    @property
    def kept(self) -> int:
        """Problems that went on."""
        return self.before - len(self.drops)


def deduplicate(problems: Iterable[Problem]) -> tuple[list[Problem], Step]:
    """Keeps the first of those that are the same text (`text_key`). Reads the source once and holds what it keeps."""
    first_of: dict[str, Problem] = {}
    drops, other_answer, count = [], 0, 0
    for count, problem in enumerate(problems, start=1):  # noqa: B007 (count is how many there were)
        first = first_of.setdefault(text_key(problem.problem), problem)
        if first is not problem:
            differs = text_key(first.answer) != text_key(problem.answer)
            other_answer += differs
            but = f", but answer {quote(problem.answer)} where that has {quote(first.answer)}" if differs else ""
            drops.append(Drop(problem.id, f"same text as {first.id}{but}"))
    tables = {
        "Their answers": {
            "as the first has it": len(drops) - other_answer,
            "written otherwise: one may be wrong": other_answer,
        }
    }
    examples = sorted(drops, key=lambda drop: ", but answer " not in drop.reason)[:EXAMPLES]
    rule = "the first of the problems that are the same text but for case, blanks and punctuation"
    return list(first_of.values()), Step("deduplicate", rule, count, drops, examples, tables if drops else {})


def decontaminate(
    problems: Sequence[Problem],
    benchmarks: Mapping[str, Sequence[Problem]],
    n: int,
    advance: Advance = lambda count: None,
) -> tuple[list[Problem], Step]:
    """Keeps problems that share no n words in a row with any benchmark problem, see `BenchmarkIndex`."""
    index = BenchmarkIndex(benchmarks, n)
    kept, drops, overlaps = [], [], []
    for problem in problems:
        overlap = index.find(problem.problem)
        if overlap is None:
            kept.append(problem)
        else:
            shared = f"{overlap.share:.0%} of the {n}-grams of" if len(overlap.text.split()) >= n else "the whole of"
            where = f"{overlap.problem_id} in {overlap.benchmark}"
            drops.append(Drop(problem.id, f"has {shared} {where}: {quote(overlap.text, 400)}"))
            overlaps.append(overlap)
        advance(1)
    worst = {}  # one example for each benchmark problem, the largest share first
    for place in sorted(range(len(drops)), key=lambda place: -overlaps[place].share):
        worst.setdefault((overlaps[place].benchmark, overlaps[place].problem_id), drops[place])
    tables = {
        "Dropped for a problem of": dict(Counter(overlap.benchmark for overlap in overlaps).most_common()),
        f"Share of that problem's {n}-grams": _count_shares([overlap.share for overlap in overlaps]),
        f"Most frequent shared words ({MANNER})": dict(Counter(one.text for one in overlaps).most_common(PHRASES)),
    } if drops else {}  # fmt: skip
    sets = ", ".join(f"{name} ({len(of)})" for name, of in benchmarks.items())
    rule = f"no {n} words in a row shared with a problem of {sets}"
    return kept, Step("decontaminate", rule, len(problems), drops, list(worst.values())[:EXAMPLES], tables)


def _count_shares(shares):
    rows = {"all": 0, "half or more": 0, "a tenth or more": 0, "less": 0}
    for share in shares:
        rows[next(label for label, low in zip(rows, (1, 0.5, 0.1, 0), strict=True) if share >= low)] += 1
    return rows


def drop_long(
    problems: Sequence[Problem], tokenizer: Tokenizer, template: Template, max_prompt: int, max_solution: int,
    advance: Advance = lambda count: None,
) -> tuple[list[Problem], Step]:  # fmt: skip
    """Keeps problems whose prompt, as the model would see it, and worked solution are short enough.

    Args:
        max_prompt, max_solution: tokens; 0 = any solution.
    """
    kept, drops, prompts, solutions = [], [], [], []
    for problem in problems:
        prompts.append(len(template.encode(problem.problem, tokenizer)))
        solution = len(tokenizer.encode(problem.solution)) if problem.solution else 0
        solutions += [solution] if problem.solution else []
        if prompts[-1] > max_prompt:
            drops.append(Drop(problem.id, f"its prompt has {prompts[-1]} tokens, more than {max_prompt}"))
        elif max_solution and solution > max_solution:
            drops.append(Drop(problem.id, f"its solution has {solution} tokens, more than {max_solution}"))
        else:
            kept.append(problem)
        advance(1)
    rule = f"prompts of at most {max_prompt} tokens (rollout.max_prompt)"
    if max_solution:
        rule += f", solutions of at most {max_solution} (prepare.max_solution)"
    tables = {"Tokens of the prompt": count_lengths(prompts, max_prompt)}
    if solutions:
        tables["Tokens of the solution"] = count_lengths(solutions, max_solution or max(solutions))
    return kept, Step("length", rule, len(problems), drops, drops[:EXAMPLES], tables)


def count_lengths(lengths: Sequence[int], limit: int) -> dict[str, int]:
    """How many there are in each eighth of the limit, and beyond it."""
    width = -(-limit // 8)
    bounds = [(start + 1, min(start + width, limit)) for start in range(0, limit, width)]
    rows = {f"{low} to {high}" if low < high else f"{low}": 0 for low, high in bounds}
    labels = list(rows)
    for length in lengths:
        label = labels[max(0, length - 1) // width] if length <= limit else f"more than {limit}"
        rows[label] = rows.get(label, 0) + 1
    return rows


def drop_unparsable(
    problems: Sequence[Problem], config: Config, advance: Advance = lambda count: None
) -> tuple[list[Problem], Step]:
    """Keeps problems whose answer can be checked.

    Mathematics: the answer is a number, a choice, a few plain words, or an expression that the checker reads and finds
    equal to itself as mathematics. To be the same string is not enough: who writes "October 30" to the letter?
    Programs: the tests can be read, and the reference program, if there is one, passes them. Puzzles: anything.
    """
    needed = {"math": lambda problem: True, "code": lambda problem: problem.solution, "gym": lambda problem: problem.answer}
    # No sandbox where there is nothing to run.
    with build_checkers(config, [problem for problem in problems if needed[problem.checker](problem)]) as checkers:
        flaws = checkers.check_golds(problems, advance)
        programs = [problem for problem in problems if problem.checker == "code" and problem.id not in flaws]
        flaws |= find_failing_references(programs, checkers)
    drops = [Drop(problem.id, flaws[problem.id]) for problem in problems if problem.id in flaws]
    kept = [problem for problem in problems if problem.id not in flaws]
    rule = "an answer, or tests, that a response can be checked by"
    return kept, Step("parsable", rule, len(problems), drops, drops[:EXAMPLES], {})


def find_failing_references(problems: Sequence[Problem], checkers: Checkers) -> dict[str, str]:
    """Ids of coding problems whose reference program, if there is one, fails its tests, to the reason."""
    runnable = [problem for problem in problems if problem.solution]
    verdicts = checkers.score((problem, as_response(problem.solution)) for problem in runnable)
    return {
        problem.id: f"its reference program is {verdict.status}, {verdict.score:.0%} of its tests passed"
        for problem, verdict in zip(runnable, verdicts, strict=True)
        if not verdict.correct
    }


def as_response(solution: str) -> str:
    """A reference program as a model would give it; one that stands in a fenced block already stays as it is."""
    return solution if "```" in solution else f"```python\n{solution}\n```"


def keep_between(
    problems: Sequence[Problem], rates: Sequence[float], above: float | None, below: float | None, samples: int
) -> tuple[list[Problem], Step]:
    """Keeps problems with above < rate < below; None is no bound.

    Args:
        rates: a pass rate for every problem, 0 to 1.
        samples: responses that each rate is the mean of.
    """
    kept, drops = [], []
    for problem, rate in zip(problems, rates, strict=True):
        if above is not None and not rate > above:
            drops.append(Drop(problem.id, f"pass rate {rate:.3g} is not above {above:g}"))
        elif below is not None and not rate < below:
            drops.append(Drop(problem.id, f"pass rate {rate:.3g} is not below {below:g}"))
        else:
            kept.append(problem)
    bounds = [f"above {above:g} (prepare.pass_above)"] if above is not None else []
    bounds += [f"below {below:g} (prepare.pass_below)"] if below is not None else []
    rule = f"a pass rate, over {samples} responses of the model, {' and '.join(bounds)}"
    tables = {"Pass rate": count_rates(rates, samples)}
    return kept, Step("pass rate", rule, len(problems), drops, drops[:EXAMPLES], tables)


def count_rates(rates: Sequence[float], samples: int) -> dict[str, int]:
    """How many there are of each rate; by tenths where there are many different ones, as of graded programs."""
    exact_rates = samples <= 16 and all((rate * samples).is_integer() for rate in rates)
    if exact_rates:
        counts = Counter(round(rate * samples) for rate in rates)
        return {f"{right} of {samples}": counts[right] for right in range(samples + 1)}
    rows = {"0": 0} | {f"up to 0.{tenth}": 0 for tenth in range(1, 10)} | {"below 1": 0, "1": 0}
    labels = list(rows)
    for rate in rates:
        rows["1" if rate == 1 else labels[math.ceil(rate * 10)]] += 1
    return rows


def quote(text: str, width: int = 80) -> str:
    """A text between quotation marks, cut to so many characters."""
    return f'"{text if len(text) <= width else text[: width - 3] + "..."}"'
