"""The steps of a preparation: what is the same text, what is a leak, what is too long, what cannot be checked."""

import random

import pytest
from tiny_config import get_config

from dgpo_jax.data.decontamination import BenchmarkIndex, longest_run, ngrams
from dgpo_jax.data.deduplication import text_key, words
from dgpo_jax.data.prompts import Template
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.preparation import steps as preparation
from dgpo_jax.preparation.steps import (
    as_response,
    count_lengths,
    count_rates,
    decontaminate,
    deduplicate,
    drop_long,
    drop_unparsable,
    keep_between,
)
from dgpo_jax.rewards.checkers import Checkers, CodeSettings, MathSettings
from dgpo_jax.rewards.pool import settled
from dgpo_jax.types import Problem, Verdict


def problems(*texts, **fields):
    """Problems p0, p1, ... with these texts."""
    return [Problem(f"p{number}", text, "1", "test", **fields) for number, text in enumerate(texts)]


@pytest.mark.parametrize("left, right", [
    ("Find $x$.", "find x"),  # case, dollar signs, the full stop
    ("the point (3,4)", "the point ( 3, 4 )"),  # blanks
    (r"\left(3,\,-4\right)", "(3, −4)"),  # spacing commands, growing brackets, a typographer's minus
    (r"\dfrac{1}{2} \leq x^{2}", r"\frac 1 2 \le x^2"),  # two spellings of one formula
    ("1,000 eggs", "1000 eggs"),  # thousands
    ("Tom’s ﬁgs", "Tom's figs"),  # an apostrophe and a ligature
    ("10² × 3", r"10^2 \times 3"),  # what stands above the line is an exponent
    (r"a \text{ km}", "a km"),  # text in a formula
])  # fmt: skip
def test_texts_that_differ_in_layout_only_are_the_same(left, right):
    assert text_key(left) == text_key(right)


@pytest.mark.parametrize("left, right", [
    ("3 + 4", "3 - 4"),  # a sign is no punctuation
    ("x^{12}", "x^1 2"),  # braces that hold something together
    ("x^{ab}", "x^ab"),  # the exponent of the second is a alone
    ("10²", "102"),  # which NFKC alone would make the same
    ("5!", "5"),  # a factorial is no exclamation
    ("1.5", "15"),  # a decimal point is no full stop
    ("f'(x)", "f(x)"),  # a derivative is no apostrophe
    ("a_1", "a1 1"),
    ("$3 - 4$", "3 4"),
])  # fmt: skip
def test_texts_that_mean_something_else_are_not_the_same(left, right):
    assert text_key(left) != text_key(right)


@pytest.mark.parametrize("text, expected", [
    ("Let $x^2+3x = 0$; find $x$!", "let x 2 3 x 0 find x"),  # signs are between words, not words
    (r"Is \frac{1}{2} = 0.5?", "is frac 1 2 0.5"),  # commands are words, a decimal is one
    ("The area[asy]draw((0,0)--(1,1));[/asy] of it", "the area of it"),  # a drawing is no part of the question
    ("求 x", "求 x"),  # a script without blanks: a character is a word
])  # fmt: skip
def test_words_are_what_is_read_aloud(text, expected):
    assert " ".join(words(text)) == expected


LEAK = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize("text, found", [
    ("One, two three four $five$ six seven eight nine.", "one two three four five six seven eight nine"),  # nine
    ("one two three four five six seven eight", None),  # eight
    ("one two three four five NO six seven eight nine ten", None),  # ten of them, but never nine in a row
    (f"{LEAK} and {LEAK}", LEAK),  # all ten: the run is reported whole, once
])  # fmt: skip
def test_nine_words_in_a_row_give_a_benchmark_problem_away(text, found):
    overlap = BenchmarkIndex({"bench": problems(LEAK)}, 9).find(text)
    assert (overlap.text if overlap else None) == found


def test_the_benchmark_problem_that_is_shared_most_of_is_named():
    shared = "a b c d e f g h i"
    index = BenchmarkIndex({"first": problems(f"{shared} k l m n o p"), "second": problems("x y", f"{shared} j")}, 9)
    overlap = index.find(f"now {shared} then")
    # 1 of the 7 nine-grams of the first set's problem, 1 of the 2 of the second set's.
    assert (overlap.benchmark, overlap.problem_id, overlap.share) == ("second", "p1", 0.5)


@pytest.mark.parametrize("short, text, leaked", [
    ("Evaluate 5!", "First, evaluate $5!$ by hand.", True),  # contained whole
    ("Evaluate 5!", "Evaluate 5 - 3.", False),  # its words are there, its sign is not
    ("Evaluate 5", "Evaluate 51", False),  # the last word must be whole
    ("rate 5", "Evaluate 5", False),  # so must the first
])  # fmt: skip
def test_a_benchmark_problem_shorter_than_n_words_is_found_only_whole(short, text, leaked):
    assert bool(BenchmarkIndex({"bench": problems(short)}, 9).find(text)) is leaked


def test_a_benchmark_text_without_words_is_in_nothing():
    assert BenchmarkIndex({"bench": problems("???")}, 9).find("what, anything at all?") is None


def test_leaks_are_those_that_comparing_every_pair_finds():
    rng = random.Random(0)

    def text():
        return " ".join(rng.choice("abcd") for _ in range(rng.randint(4, 9)))

    bench, texts = problems(*[text() for _ in range(6)]), [text() for _ in range(200)]
    index = BenchmarkIndex({"bench": bench}, 4)
    leaked = [
        any(" ".join(gram) in problem.problem for problem in bench for gram in ngrams(one.split(), 4)) for one in texts
    ]
    assert [index.find(one) is not None for one in texts] == leaked
    assert 20 < sum(leaked) < 180  # both kinds occur, or this would compare nothing


@pytest.mark.parametrize("places, expected", [
    ([4], (4, 1)),
    ([1, 2, 5, 6, 7], (5, 3)),  # the longer of two
    ([1, 2, 5, 6], (1, 2)),  # the first of two as long
    ([1, 3, 5], (1, 1)),
])  # fmt: skip
def test_the_longest_run_is_found(places, expected):
    assert longest_run(places) == expected


def test_the_first_of_equal_texts_is_kept_and_another_answer_is_pointed_out():
    given = problems("Find x.", "find  x", "Find y.", "FIND X.")
    given[3] = given[3]._replace(answer="2")
    kept, step = deduplicate(iter(given))
    assert [problem.id for problem in kept] == ["p0", "p2"]
    assert (step.before, step.kept, [drop.id for drop in step.drops]) == (4, 2, ["p1", "p3"])
    assert step.drops[1].reason == 'same text as p0, but answer "2" where that has "1"'
    assert step.examples[0].id == "p3"  # what somebody must look at comes first


def test_answers_that_only_look_different_are_no_contradiction():
    given = problems("Find x.", "find x")
    given[0], given[1] = given[0]._replace(answer=r"7 - 2\pi"), given[1]._replace(answer=r"7-2 \pi")
    assert deduplicate(given)[1].drops[0].reason == "same text as p0"


def test_a_leak_is_dropped_with_the_problem_and_the_words_that_give_it_away():
    kept, step = decontaminate(problems("clean", f"Now {LEAK}."), {"bench": problems(LEAK), "other": problems("z")}, 9)
    assert [problem.id for problem in kept] == ["p0"]
    assert step.drops == [("p1", f'has 100% of the 9-grams of p0 in bench: "{LEAK}"')]
    assert step.tables["Dropped for a problem of"] == {"bench": 1}
    assert step.tables["Share of that problem's 9-grams"]["all"] == 1


TOKENIZER, PLAIN = load_tokenizer("builtin:words"), Template("plain")


def test_a_prompt_or_solution_of_exactly_the_limit_is_kept():
    given = problems("how many", "how many apples", solution="1 + 1")
    lengths = [len(PLAIN.encode(problem.problem, TOKENIZER)) for problem in given]
    assert lengths[1] == lengths[0] + 1
    kept, step = drop_long(given, TOKENIZER, PLAIN, lengths[0], 0)
    assert [problem.id for problem in kept] == ["p0"]
    assert step.drops[0].reason == f"its prompt has {lengths[1]} tokens, more than {lengths[0]}"
    size = len(TOKENIZER.encode("1 + 1"))
    assert len(drop_long(given, TOKENIZER, PLAIN, 99, size)[0]) == 2
    kept, step = drop_long(given, TOKENIZER, PLAIN, 99, size - 1)
    assert not kept and step.drops[0].reason == f"its solution has {size} tokens, more than {size - 1}"


def test_what_the_template_adds_counts_as_prompt():
    given = problems("how many")
    bare = len(PLAIN.encode("how many", TOKENIZER))
    assert not drop_long(given, TOKENIZER, Template("plain", instruction="how many"), bare, 0)[0]


@pytest.mark.parametrize("lengths, limit, expected", [
    ([1, 2, 3, 16, 17, 99], 16, {"1 to 2": 2, "3 to 4": 1, "15 to 16": 1, "more than 16": 2}),
    ([3], 3, {"3": 1}),  # a limit below eight has a row for each length
    ([0], 8, {"1": 1}),  # no length at all goes with the shortest
])  # fmt: skip
def test_lengths_are_counted_by_eighths_of_the_limit(lengths, limit, expected):
    rows = count_lengths(lengths, limit)
    assert {label: count for label, count in rows.items() if count} == expected


def test_rates_are_counted_by_right_responses_or_by_tenths():
    assert count_rates([0.0, 0.5, 0.5, 1.0], 4) == {"0 of 4": 1, "1 of 4": 0, "2 of 4": 2, "3 of 4": 0, "4 of 4": 1}
    graded = count_rates([0.0, 0.05, 0.1, 0.95, 1.0], 4)  # 0.05 is no quarter
    assert {label: count for label, count in graded.items() if count} == {"0": 1, "up to 0.1": 2, "below 1": 1, "1": 1}


@pytest.mark.parametrize("above, below, kept", [
    (0.5, None, [0.75, 1.0]),  # Klear: strictly more
    (None, 1.0, [0.0, 0.5, 0.75]),  # strictly less
    (0.0, 1.0, [0.5, 0.75]),  # neither never nor always solved
    (0.5, 0.75, []),
])  # fmt: skip
def test_pass_rates_are_kept_strictly_between_the_bounds(above, below, kept):
    rates = [0.0, 0.5, 0.75, 1.0]
    left, step = keep_between(problems("a", "b", "c", "d"), rates, above, below, 4)
    assert [rates[int(problem.id[1:])] for problem in left] == kept
    assert step.kept == len(kept)


@pytest.mark.parametrize("answer, kept", [
    ("42", True),
    (r"\frac{1}{2}", True),
    ("(3, -4)", True),
    ("x^2 + 1", True),
    (r"\text{Tuesday}", True),  # plain words are compared as words
    ("(B)", True),  # so are choices
    ("see the solution of the previous exercise", False),  # prose, though it is the same string as itself
    (r"\frac{1}{", False),  # no expression
    ("np.arcsin(10/13", False),
])  # fmt: skip
def test_an_answer_must_be_readable_as_an_answer(answer, kept):
    given = [Problem("p0", "?", answer, "test")]
    left, step = drop_unparsable(given, get_config())
    assert bool(left) is kept
    assert kept or "its answer" in step.drops[0].reason


def code_problem(tests, solution=""):
    return Problem("c", "write it", "", "test", solution, "code", tests)


@pytest.mark.parametrize("tests, kept", [
    ('{"inputs": ["1\\n"], "outputs": ["2\\n"]}', True),
    ('{"inputs": ["1\\n"], "outputs": []}', False),  # as many inputs as outputs
    ('{"inputs": [', False),
])  # fmt: skip
def test_tests_must_be_readable(tests, kept):
    left, step = drop_unparsable([code_problem(tests)], get_config())
    assert bool(left) is kept
    assert kept or step.drops[0].reason.startswith("its tests")


def test_a_reference_program_must_pass_its_tests(monkeypatch):
    class FakeCheckers(Checkers):
        def submit(self, problem, response):
            assert response == "```python\nprint(3)\n```"
            return settled(Verdict("wrong", "print(3)", 0.25))

    def build(config, problems):
        assert [problem.id for problem in problems] == ["c", "e"]  # the other has no program
        return FakeCheckers(MathSettings(), CodeSettings(), ())

    monkeypatch.setattr(preparation, "build_checkers", build)
    tests = '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'
    given = [
        code_problem(tests, "print(3)"),
        code_problem(tests)._replace(id="d"),
        code_problem("{", "print(3)")._replace(id="e"),  # no tests to run it against
    ]
    kept, step = drop_unparsable(given, get_config())
    assert [problem.id for problem in kept] == ["d"]
    assert step.drops[0] == ("c", "its reference program is wrong, 25% of its tests passed")
    assert step.drops[1].id == "e"


def test_a_program_in_a_fenced_block_stays_as_it_is():
    assert as_response("Thus:\n```python\nprint(1)\n```") == "Thus:\n```python\nprint(1)\n```"


def test_puzzles_are_left_alone():
    puzzle = Problem("g", "?", "", "test", "", "gym", "{}")
    assert drop_unparsable([puzzle], get_config())[0] == [puzzle]
