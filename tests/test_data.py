"""Problems: generated ones, JSON lines, several sources at once, and the stream that a resumed run must continue exactly."""

import json
import re
import sys
import types

import pytest

from dgpo_jax.data.generated import KINDS, OPERATIONS, GeneratedProblems
from dgpo_jax.data.problems import ProblemStream, fingerprint, load_problems
from dgpo_jax.types import Problem

TOM = {"problem": "2 + 2?", "answer": "4"}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_problem_depends_on_seed_and_index_alone(kind):
    long, short = GeneratedProblems(kind, 500, seed=3), GeneratedProblems(kind, 8, seed=3)
    assert long[7] == short[7] == GeneratedProblems(kind, 500, seed=3)[7]
    assert long[:5] == [long[i] for i in range(5)] and long[-1] == long[499]
    assert [p.problem for p in long[:20]] != [p.problem for p in GeneratedProblems(kind, 20, seed=4)]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_never_occur_in_training_whatever_the_seed(kind):
    def questions(split, seed):  # without names and things, so that the same sum about other things counts as the same
        words = "|".join(KINDS[kind].names + KINDS[kind].things)
        return {re.sub(words, "X", problem.problem) for problem in GeneratedProblems(kind, 2000, seed, split=split)}

    train = questions("train", 0) | questions("train", 1)
    assert not train & (questions("test", 0) | questions("test", 7))


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_of_a_generated_problem_is_what_its_solution_computes(kind):
    seen = set()
    for problem in GeneratedProblems(kind, 1000):
        a, sign, b = re.match(r"(\d+) ([-+*/]) (\d+) = ", problem.solution).groups()
        a, b = int(a), int(b)
        answer = int(problem.answer)
        assert answer >= 0
        assert {"+": a + b == answer, "-": a - b == answer, "*": a * b == answer, "/": a == b * answer}[sign]
        assert {str(a), str(b)} <= set(re.findall(r"\d+", problem.problem))
        seen.add(sign)
    assert seen == {OPERATIONS[name].sign for name in KINDS[kind].templates}


def test_solutions_are_written_in_the_two_styles_that_the_checker_extracts():
    assert GeneratedProblems("arithmetic", 1)[0].solution == r"19 + 5 = \boxed{24}"
    assert GeneratedProblems("words", 1)[0].solution == "19 + 6 = 25. The answer is 25."


def test_numbers_and_operations_of_generated_problems_can_be_set():
    problems = load_problems("generated:words", size=300, low=2, high=9, operations="multiply, share")
    for problem in problems:
        a, sign, b = re.match(r"(\d+) ([*/]) (\d+)", problem.solution).groups()
        factors = (int(a), int(b)) if sign == "*" else (int(problem.answer), int(b))
        assert all(2 <= factor <= 9 for factor in factors)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "word"}, "'word' is not one of arithmetic, words"),
        ({"split": "eval"}, "split: 'eval' is not one of train, test"),
        ({"operations": "divide"}, "operations: 'divide' is not one of"),
        ({"low": 5, "high": 4}, "0 <= low <= high"),
        ({"low": 0}, "divide by zero"),
        ({"low": 2, "high": 3}, "too few to hold some out"),
        ({"size": 0}, "size 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_generated_problems_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GeneratedProblems(**{"kind": "words", "size": 10, **arguments})


def test_numbers_that_leave_no_held_out_problem_are_an_error_and_no_endless_search():
    problems = GeneratedProblems("arithmetic", 1, split="test", low=502, high=506, operations="subtract")
    with pytest.raises(ValueError, match=r"numbers 502..506 of subtract leave no problem for the test split"):
        problems[0]


def test_a_source_names_its_split():
    assert load_problems("generated:words/test", size=3)[0].id == "words-test-0-0"
    assert load_problems("generated:words", size=3)[0].id == "words-train-0-0"
    with pytest.raises(ValueError, match="'gsm8k' is not generated:KIND/SPLIT, builtin:coding/SPLIT, gym:NAME/SPLIT, tfds:"):
        load_problems("gsm8k")


# (source, the arguments that the maker is called with)
MADE = [
    ("builtin:coding/test", ("test", 7, 3, "linear", 0.25, 0.5)),
    ("builtin:coding", ("train", 7, 3, "linear", 0.25, 0.5)),
    ("gym:chain_sum/test", ("chain_sum", "test", 7, 3)),
    ("gym:chain_sum(min_terms=2,max_terms=3),gcd", ("chain_sum(min_terms=2,max_terms=3),gcd", "train", 7, 3)),
    ("gym:odd(path=a/b)", ("odd(path=a/b)", "train", 7, 3)),  # a slash among the settings is no split
    ("gym:odd(path=a/b)/test", ("odd(path=a/b)", "test", 7, 3)),
]


@pytest.mark.parametrize("source, expected", MADE)
def test_sources_that_are_made_get_name_split_size_and_seed(monkeypatch, source, expected):
    def remember(*arguments):
        return [Problem("1", "?", "1", str(arguments))]

    for module, function in (("coding", "coding_problems"), ("gym", "gym_problems")):
        stand_in = types.SimpleNamespace(**{function: remember})
        monkeypatch.setitem(sys.modules, f"dgpo_jax.data.{module}", stand_in)
    carelessness = {"operations": "linear", "slips": 0.25, "unmarked": 0.5}  # which gym sets do not know
    assert load_problems(source, size=7, seed=3, **carelessness)[0].source == str(expected)


def test_there_is_one_built_in_set():
    with pytest.raises(ValueError, match="builtin:maths/test: no built-in set 'maths'; the only one is coding"):
        load_problems("builtin:maths/test")


def test_sources_joined_by_a_plus_are_read_one_after_the_other(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", TOM, {**TOM, "id": "b"})
    joined = load_problems(f"{path} + generated:words/test + {write_lines(tmp_path / 'more.jsonl', TOM)}", size=3)
    assert [p.id for p in joined] == ["set-1", "b", "words-test-0-0", "words-test-0-1", "words-test-0-2", "more-1"]
    assert len(joined) == 6 and joined[-1].id == "more-1" and [p.id for p in joined[1:3]] == ["b", "words-test-0-0"]
    assert [p.id for p in ProblemStream(joined, 0).take(0, 6)] != [p.id for p in joined]
    with pytest.raises(IndexError):
        joined[6]


def test_an_id_that_two_sources_share_is_refused_with_both(tmp_path):
    one, other = (write_lines(tmp_path / f"{name}.jsonl", {**TOM, "id": "same"}) for name in ("one", "other"))
    with pytest.raises(ValueError, match=r"id 'same' is in .*one.jsonl and in .*other.jsonl; ids must be unique"):
        load_problems(f"{one} + {other}")


def test_a_fingerprint_changes_with_what_a_score_depends_on_and_with_nothing_else():
    problem = Problem("1", "2 + 2?", "4", "s", tests="[]")
    ours = fingerprint([problem, problem._replace(id="2")])
    same = [problem._replace(source="t", solution="w"), problem._replace(id="2")]
    assert fingerprint(same) == ours and len(ours) == 64
    for change in ({"id": "x"}, {"problem": "x"}, {"answer": "x"}, {"tests": "x"}, {"checker": "code"}, {"tolerance": 0.1}):
        assert fingerprint([problem._replace(**change), problem._replace(id="2")]) != ours
    assert fingerprint([problem]) != ours != fingerprint([problem._replace(id="2"), problem])
    # sha256 of the line ["1", "2 + 2?", "4", "[]", "math", 1e-06], by hand with sha256sum
    assert fingerprint([problem]) == "59bc6b72f3d8fbb6663640d8fe39d998e02d4d3f7068721ea94f1c5dc1983420"


def test_where_solutions_are_learned_from_they_are_in_the_fingerprint_too():
    problem = Problem("1", "2 + 2?", "4", "s", solution="2 + 2 = 4")
    ours = fingerprint([problem], solutions=True)
    assert fingerprint([problem._replace(source="t")], solutions=True) == ours
    for change in ({"solution": "4"}, {"answer": "x"}):
        assert fingerprint([problem._replace(**change)], solutions=True) != ours


def test_json_lines_are_read_with_defaults_for_what_is_optional(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", TOM, {"question": "x", **TOM, "id": "b", "source": "s", "solution": "w"})
    assert load_problems(str(path)) == [
        Problem("set-1", "2 + 2?", "4", "set", ""),
        Problem("b", "2 + 2?", "4", "s", "w"),
    ]


def test_json_lines_may_use_other_field_names_numbers_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "2 + 2?", "a": 4}\r\n\r\n{"q": "half?", "a": 0.5}')
    problems = load_problems(str(path), problem_field="q", answer_field="a")
    assert [(p.id, p.answer) for p in problems] == [("set-1", "4"), ("set-3", "0.5")]


def test_a_row_may_say_how_it_is_checked(tmp_path):
    tests = {"inputs": ["1\n"], "outputs": ["é\n"]}
    path = write_lines(
        tmp_path / "set.jsonl",
        {"problem": "write", "checker": "code", "tests": tests},  # an object is kept as JSON; no answer is needed
        {"problem": "write", "answer": None, "checker": "code", "tests": json.dumps(tests)},
        {**TOM, "tolerance": 0.01, "checker": None, "tests": None, "solution": None},  # null is as if it were absent
    )
    first, second, third = load_problems(str(path))
    assert (first.answer, first.checker, json.loads(first.tests), json.loads(second.tests)) == ("", "code", tests, tests)
    assert "é" in first.tests and second.answer == ""
    assert (third.checker, third.tests, third.tolerance, third.solution) == ("math", "", 0.01, "")
    assert first.tolerance == Problem("", "", "", "").tolerance


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no problem"),
        (b"\n \n", "holds no problem"),
        (b'{"problem": "a", "answer": "1"}\n{oops}\n', "set.jsonl:2: not JSON at column 2"),
        (b'["a"]', 'set.jsonl:1: ["a"] is not an object'),
        ('{"problem": "café", "answer": "1"}'.encode("latin-1"), "set.jsonl:1: byte 0xe9 at column 17 is not UTF-8"),
        (b'{"problem": "a"}', "no field 'answer' among 'problem'"),
        (b'{"problem": "a", "answers": "1"}', "perhaps it is 'answers'"),
        (b'{"problem": "a", "answer": " "}', 'answer is " "; it must not be empty'),
        (b'{"problem": "", "answer": "1"}', 'problem is ""; it must not be empty'),
        (b'{"problem": "a", "answer": null}', "answer is null; it must be text or a number"),
        (b'{"problem": "a", "answer": [1]}', "answer is [1]; it must be text or a number"),
        (b'{"problem": "a", "answer": NaN}', "answer is NaN; it must be text or a number"),
        (b'{"problem": "a", "answer": true}', "answer is true; it must be text or a number"),
        (
            b'{"id": 1, "problem": "a", "answer": 1}\n{"id": "1", "problem": "b", "answer": 1}',
            "set.jsonl:2: id '1' was used at ",
        ),
        (b'{"problem": "a", "answer": "", "checker": "maths"}', 'checker is "maths"; it must be one of math, code, gym'),
        (b'{"problem": "a", "answer": "", "checker": "math"}', "answer is \"\"; it must not be empty"),
        (b'{"problem": "a", "checker": "code"}', "checker is 'code' but tests is empty"),
        (b'{"problem": "a", "checker": "code", "tests": "assert"}', 'tests is "assert", which is not JSON'),
        (b'{"problem": "a", "answer": 1, "tests": 3.5, "tolerance": 1}', "tolerance is 1; it is a relative distance"),
        (b'{"problem": "a", "answer": 1, "tolerance": NaN}', "tolerance is NaN; it is a relative distance"),
        (b'{"problem": "a", "answer": 1, "tolerance": -0.1}', "tolerance is -0.1; it is a relative distance"),
        (b'{"problem": "a", "answer": 1, "tolerance": "0.1"}', 'tolerance is "0.1"; it is a relative distance'),
        (b'{"problem": "a \\ud83d", "answer": 1}', "problem holds \\ud83d at character 2, half of a surrogate pair"),
        (b'{"problem": ' + b"[" * 100_000, "set.jsonl:1: n"),  # "nested too deeply" or "not JSON", by the version of Python
    ],
)
def test_a_faulty_json_line_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(str(path))


def test_a_missing_file_is_refused_with_the_closest_name(tmp_path):
    write_lines(tmp_path / "aime24.jsonl", TOM)
    with pytest.raises(ValueError, match=r"aime42.jsonl: no such file; perhaps .*aime24.jsonl"):
        load_problems(str(tmp_path / "aime42.jsonl"))


def make_stream(size, seed=0):
    return ProblemStream([Problem(str(i), "?", "1", "s") for i in range(size)], seed)


def test_every_epoch_of_the_stream_holds_every_problem_once_in_another_order():
    ids = [problem.id for problem in make_stream(50).take(0, 150)]
    epochs = [ids[:50], ids[50:100], ids[100:]]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(50)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [problem.id for problem in make_stream(50, seed=1).take(0, 50)]


def test_a_stream_opened_anew_at_a_position_goes_on_as_if_never_closed():
    whole = make_stream(10).take(0, 47)  # across four epoch boundaries
    pieces = [make_stream(10).take(position, min(7, 47 - position)) for position in range(0, 47, 7)]
    assert [problem for piece in pieces for problem in piece] == whole
    used = make_stream(10)
    used.take(35, 3)  # reading elsewhere leaves no trace
    assert used.take(8, 4) == whole[8:12]


def test_more_problems_can_be_taken_than_there_are():
    assert [problem.id for problem in make_stream(1).take(5, 3)] == ["0", "0", "0"]
    assert make_stream(3).take(4, 0) == []


@pytest.mark.parametrize("call", [lambda: make_stream(0), lambda: make_stream(3, -1), lambda: make_stream(3).take(-1, 2)])
def test_an_impossible_stream_is_refused(call):
    with pytest.raises(ValueError):
        call()
