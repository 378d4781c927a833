"""Problems: generated ones, JSON lines, TFDS, and the stream that a resumed run must continue exactly."""

import json
import re
import subprocess
import sys

import pytest

from dgpo_jax.data.generated import KINDS, OPERATIONS, GeneratedProblems
from dgpo_jax.data.problems import ProblemStream, load_problems, read_jsonl
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
    with pytest.raises(ValueError, match="not generated:KIND/SPLIT"):
        load_problems("gsm8k")


def test_json_lines_are_read_with_defaults_for_what_is_optional(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", TOM, {"question": "x", **TOM, "id": "b", "source": "s", "solution": "w"})
    assert read_jsonl(path) == [
        Problem("set-1", "2 + 2?", "4", "set", ""),
        Problem("b", "2 + 2?", "4", "s", "w"),
    ]


def test_json_lines_may_use_other_field_names_numbers_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "2 + 2?", "a": 4}\r\n\r\n{"q": "half?", "a": 0.5}')
    problems = load_problems(str(path), problem_field="q", answer_field="a")
    assert [(p.id, p.answer) for p in problems] == [("set-1", "4"), ("set-3", "0.5")]


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
        (
            b'{"id": 1, "problem": "a", "answer": 1}\n{"id": "1", "problem": "b", "answer": 1}',
            ":2: id '1' was used on line 1",
        ),
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


TFDS_SCRIPT = """
import sys
from dgpo_jax.data.problems import load_problems
problems = load_problems("tfds:gsm8k/test", data_dir=sys.argv[1], manual_dir=sys.argv[2])
assert [problem.answer for problem in problems[:]] == ["1200", "-3"], problems[:]
assert problems[1].problem == "Café?" and problems[-1].id == "gsm8k-test-0001"
assert problems[0].solution == "1000+200=1,200\\n#### 1,200"
assert len(load_problems("tfds:gsm8k", data_dir=sys.argv[1])) == 1  # built already: no file is looked for
for module in ("tensorflow", "jax", "flax", "torch"):
    assert module not in sys.modules, module
"""


def test_gsm8k_is_built_from_files_fetched_by_hand_without_tensorflow(tmp_path):
    rows = [{"question": "How much?", "answer": "1000+200=1,200\n#### 1,200"}, {"question": "Café?", "answer": "#### -3"}]
    write_lines(tmp_path / "train.jsonl", rows[0])
    write_lines(tmp_path / "test.jsonl", *rows)
    command = [sys.executable, "-c", TFDS_SCRIPT, str(tmp_path / "built"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "source, message",
    [
        ("tfds:gsm8", "tfds:gsm8: no such set; choose one of gsm8k"),
        ("tfds:gsm8k/validation", "no such split; choose one of train, test"),
        ("tfds:gsm8k/train", "train.jsonl: no such file; fetch it from https://"),
    ],
)
def test_a_tfds_source_that_cannot_be_read_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(source, data_dir=str(tmp_path), manual_dir=str(tmp_path))
