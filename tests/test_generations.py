"""The file of judged responses, what they vote for, and how sets are answered batch by batch."""

import json
import math
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_jax.evaluation.estimators import NO_VOTE, RIGHT
from dgpo_jax.evaluation.generations import Generations, count_done, read_generations, rewrite, to_row
from dgpo_jax.evaluation.judging import Answered, Judged, count_votes, figures
from dgpo_jax.evaluation.sampling import Round, answer_set, batch_of, generate_set
from dgpo_jax.metrics import write_lines
from dgpo_jax.rl.drawing import EVALUATION
from dgpo_jax.rollout import Responses
from dgpo_jax.types import Problem, Prompts, Rollout, Verdict

PROBLEMS = [Problem(f"p{number}", f"what is {number}?", str(number), "test") for number in range(7)]


def judged(text, status="wrong", extracted="7", vote=1, share=None):
    return Judged(text, Verdict(status, extracted, share), vote, tokens=len(text), truncated=False)


DONE = [
    Answered(problem, [judged(f"it is {problem.id}"), judged("nothing", "no_answer", None, NO_VOTE)])
    for problem in PROBLEMS[:3]
]


def write(path, done, samples=2):
    with Generations(path, PROBLEMS, samples) as store:
        for answered in done:
            store.append(answered)
    return path


def test_what_is_kept_reads_back_the_same(tmp_path):
    odd = Answered(
        PROBLEMS[0],
        [judged('half a pair \ud83d, "quotes", a\nline, \u2028, é'), judged("x", "wrong", "a", 2, share=0.25)],
    )
    path = write(tmp_path / "generations/set.jsonl", [odd])
    assert read_generations(path, PROBLEMS) == [odd]
    assert (
        path.read_bytes().count(b"\n") == 1 and "é".encode() in path.read_bytes()
    )  # a line, and one that people can read


def test_a_line_says_everything_of_a_response(tmp_path):
    row = json.loads(write(tmp_path / "set.jsonl", DONE).read_text().splitlines()[1])
    assert row == {
        "problem_id": "p1", "problem": "what is 1?", "answer": "1",
        "responses": [
            {"sample": 0, "text": "it is p1", "extracted": "7", "status": "wrong", "share": None,
             "vote": 1, "tokens": 8, "truncated": False},
            {"sample": 1, "text": "nothing", "extracted": None, "status": "no_answer", "share": None,
             "vote": -1, "tokens": 7, "truncated": False},
        ],
    }  # fmt: skip


def test_wherever_a_line_is_torn_the_whole_ones_count_and_the_file_ends_up_the_same(tmp_path):
    path = write(tmp_path / "set.jsonl", DONE)
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), 41), *(end + move for end in line_ends(whole) for move in (-1, 0, 1))}):
        path.write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        assert count_done(path) == kept
        with Generations(path, PROBLEMS, 2) as store:
            assert store.done == DONE[:kept]
            for answered in DONE[kept:]:
                store.append(answered)
        assert path.read_bytes() == whole


def line_ends(text):
    """The number of bytes up to the end of each line but the last."""
    return [place + 1 for place, byte in enumerate(text[:-1]) if byte == ord("\n")]


def test_opening_a_file_that_is_whole_does_not_touch_it(tmp_path):
    # Reports that are newer than the responses are not made again.
    path = write(tmp_path / "set.jsonl", DONE)
    before = path.stat().st_mtime_ns
    write(path, [])
    assert path.stat().st_mtime_ns == before


def test_a_rewritten_file_has_the_same_lines_as_an_appended_one(tmp_path):
    odd = [*DONE, Answered(PROBLEMS[3], [judged("half a pair \udc80"), judged("é \u2028", share=0.1)])]
    path = write(tmp_path / "set.jsonl", odd)
    before = path.read_bytes()
    rewrite(path, odd)
    assert path.read_bytes() == before


@pytest.mark.parametrize("spoil, complaint", [
    (lambda row: row | {"problem_id": "p9"}, "set.jsonl:1 answers 'p9', where the set has 'p0'"),
    (lambda row: row | {"problem": "another question?"}, "set.jsonl:1 answers 'p0'"),  # changed under its id
    (lambda row: row | {"answer": "1"}, "set.jsonl:1 answers 'p0'"),
    (lambda row: row | {"responses": row["responses"][:1]}, "p0 has 1 responses, not 2"),
    (lambda row: {"problem_id": "p0"}, "set.jsonl:1 is damaged (KeyError: 'problem')"),
    (lambda row: [1], "set.jsonl:1 is damaged"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, spoil, complaint):
    path = write(tmp_path / "set.jsonl", DONE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [spoil(rows[0]), *rows[1:]]))
    with pytest.raises(ValueError, match=r"delete|workdir") as refusal:
        Generations(path, PROBLEMS, 2)
    assert complaint in str(refusal.value)


def change_response(**changes):
    return lambda row: row | {"responses": [row["responses"][0] | changes, *row["responses"][1:]]}


@pytest.mark.parametrize("changes, complaint", [
    ({"status": []}, "status is [], but it is one of correct, wrong"),
    ({"status": "fine"}, "status is 'fine', but it is one of correct, wrong"),  # would count as wrong
    ({"share": "x"}, "share is 'x', but it is a number from 0 to 1, or null"),
    ({"share": 2}, "share is 2"),
    ({"share": math.nan}, "share is nan"),
    ({"share": True}, "share is True"),
    ({"tokens": "x"}, "tokens is 'x', but it is a number of tokens"),
    ({"tokens": -1}, "tokens is -1"),
    ({"truncated": "x"}, "truncated is 'x', but it is true or false"),
    ({"truncated": 1}, "truncated is 1"),
    ({"vote": "1"}, "vote is '1', but it is an answer's number, or -1"),
    ({"vote": 0.5}, "vote is 0.5"),
    ({"text": 5}, "text is 5, but it is text"),
    ({"extracted": ["7"]}, "extracted is ['7'], but it is text or null"),
    ({"text": ["long"] * 1000}, "text is ['long', "),
])  # fmt: skip
def test_a_response_of_another_type_is_refused_with_file_line_and_value(tmp_path, changes, complaint):
    path = write(tmp_path / "set.jsonl", DONE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], change_response(**changes)(rows[1]), rows[2]]))
    with pytest.raises(ValueError, match=r"set.jsonl:2 is damaged .*; delete the file, or mend that line") as refusal:
        read_generations(path, PROBLEMS)
    assert complaint in str(refusal.value) and len(str(refusal.value)) < 300 + len(str(tmp_path))


def test_json_that_is_deeper_than_the_reader_goes_is_damage_too(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"set.jsonl:1 is damaged \(RecursionError"):
        read_generations(path, PROBLEMS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["wrong", "correct", 1, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "status", "x"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_line_it_is_refused_in_one_line_or_counted(tmp_path, data):
    path = tmp_path / "set.jsonl"
    row = to_row(DONE[0])
    place = data.draw(st.sampled_from([*row, *(("responses", 0, name) for name in row["responses"][0]), ("responses", 0), ()]))
    value = data.draw(VALUES)
    spoilt = spoil(row, (place,) if isinstance(place, str) else place, value)
    line = json.dumps(spoilt).encode()
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(line)))
        line = line[:cut] + data.draw(st.binary(max_size=3).filter(lambda piece: b"\n" not in piece)) + line[cut + 1 :]
    path.write_bytes(line + b"\n")
    try:
        found = read_generations(path, PROBLEMS)
    except ValueError as error:
        assert "set.jsonl:1" in str(error) and len(str(error).splitlines()) == 1
        return
    if found[0].responses:
        figures(found)
    rewrite(path, found)
    assert read_generations(path, PROBLEMS) == found


def spoil(value, place, new):
    """The value with `new` at a path of keys and indices."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = spoil(copy[place[0]], place[1:], new)
    return copy


def test_more_problems_than_the_set_has_are_refused(tmp_path):
    path = write(tmp_path / "set.jsonl", DONE)
    with pytest.raises(ValueError, match="holds 3 problems, but the set has 2"):
        read_generations(path, PROBLEMS[:2])


class Checkers:
    """An answer is the last word of a response; those of the same length are equal, and the reference is right."""

    def __init__(self):
        self.compared = []

    def submit(self, problem, response):
        answer = response.split()[-1] if response.split() else None
        status = "no_answer" if answer is None else "correct" if answer == problem.answer else "wrong"
        return settled(Verdict(status, answer))

    def compare(self, answer, other, tolerance):
        self.compared.append((answer, other))
        return settled(Verdict("correct" if len(answer) == len(other) else "wrong", other))

    def gather(self, tickets):
        return [ticket.result() for ticket in tickets]


def settled(result):
    ticket = Future()
    ticket.set_result(result)
    return ticket


@pytest.mark.parametrize("answers, expected", [
    (["a", "b", "ccc"], [1, 1, 2]),  # a and b are equal
    (["ccc", "a", "ddd", "b"], [1, 2, 1, 2]),  # numbers in the order of appearance
    ([None, "a", None, "a"], [NO_VOTE, 1, NO_VOTE, 1]),
    (["+0", "a", "+0"], [RIGHT, 1, RIGHT]),
])  # fmt: skip
def test_equal_answers_vote_together(answers, expected):
    verdicts = [
        Verdict("no_answer" if answer is None else "correct" if answer == "+0" else "wrong", answer)
        for answer in answers
    ]
    assert count_votes(Checkers(), PROBLEMS[0], verdicts) == expected


def test_answers_that_were_not_judged_vote_with_the_same_letters_and_are_not_compared():
    verdicts = [
        Verdict("wrong", "a"),
        Verdict("unparsable", "b"),
        Verdict("timed_out", "c"),
        Verdict("timed_out", "c"),
        Verdict("wrong", "d"),
    ]
    checkers = Checkers()
    assert count_votes(checkers, PROBLEMS[0], verdicts) == [1, 2, 3, 3, 1]
    assert checkers.compared == [("a", "d")]


def test_the_same_letters_are_compared_once():
    checkers = Checkers()
    count_votes(checkers, PROBLEMS[0], [Verdict("wrong", answer) for answer in ["a", "bb", "bb", "a", "bb"]])
    assert checkers.compared == [("a", "bb")]


def test_programs_do_not_vote():
    program = PROBLEMS[0]._replace(checker="code")
    assert (
        count_votes(Checkers(), program, [Verdict("wrong", "print(1)", 0.5), Verdict("correct", "x", 1.0)])
        == [NO_VOTE] * 2
    )


def test_figures_of_a_set_by_hand():
    done = [
        Answered(PROBLEMS[0], [judged("aa", "correct", "0", RIGHT), judged("bbbb")]),
        Answered(PROBLEMS[1], [judged("cc"), judged("dddd", "no_answer", None, NO_VOTE)]),
    ]
    found = figures(done)
    assert list(found) == [
        "avg@2", "pass@1", "pass@2", "best@2", "maj@1", "maj@2", "tokens", "truncated",
        "correct", "wrong", "no_answer", "unparsable", "timed_out", "crashed",
    ]  # fmt: skip
    values = {key: value.value for key, value in found.items()}
    assert values["avg@2"] == 0.25 and values["pass@2"] == 0.5 and values["best@2"] == (1 - 1 / 4) / 2
    assert values["maj@2"] == 0.25  # the first problem's two answers tie
    assert values["tokens"] == 3 and values["wrong"] == 0.5 and values["no_answer"] == 0.25


def test_problems_that_were_not_asked_count_as_wrong_in_scores_only():
    done = [Answered(PROBLEMS[0], [judged("aa", "correct", "0", RIGHT)])]
    found = figures(done, wrong_unasked=3)
    assert found["avg@1"] == found["pass@1"] == found["maj@1"] and found["avg@1"].value == 0.25
    assert found["tokens"].value == 2 and found["correct"].value == 1.0


def test_grades_count_in_averages_and_only_whole_ones_in_pass():
    done = [Answered(PROBLEMS[0]._replace(checker="code"), [judged("a", share=0.5), judged("b", share=0.0)])]
    found = {key: value.value for key, value in figures(done).items()}
    assert found["avg@2"] == 0.25 and found["best@2"] == 0.5 * 3 / 4 and found["pass@2"] == 0.0 and "maj@2" not in found


@pytest.mark.parametrize("at_once, samples, largest, expected", [
    (64, 8, 100, (8, 64)),
    (64, 8, 3, (3, 24)),  # no more than there are
    (64, 1, 100, (64, 64)),
    (60, 8, 100, (7, 56)),  # whole problems
    (16, 33, 100, (1, 16)),  # of one problem's samples 17 wait for a slot
    (64, 8, 0, (1, 8)),  # an empty set must not divide by zero
])  # fmt: skip
def test_the_problems_and_slots_of_a_batch(at_once, samples, largest, expected):
    assert batch_of(at_once, samples, largest) == expected


class FakeRollout:
    """A response says which problem and sample it is, by the numbers that a sampler would fold into its key."""

    def __init__(self, problems, samples):
        self.problems, self.samples, self.calls = problems, samples, []

    def __call__(self, params, problems, draw):
        assert len(problems) <= self.problems and draw.stream == EVALUATION
        self.calls.append(draw.first_prompt)
        texts = [
            f"seed {draw.seed} prompt {draw.first_prompt + row} sample {sample} of {problem.id}"
            for row, problem in enumerate(problems) for sample in range(self.samples)
        ]  # fmt: skip
        lengths = np.arange(len(texts)) % 3 + 1
        mask = np.arange(3) < lengths[:, None]
        rollout = Rollout(np.zeros_like(mask, np.int32), mask, np.zeros(mask.shape, np.float32), lengths == 3)
        empty = np.zeros((len(problems), 1), np.int32)
        return Responses(problems, Prompts(empty, empty > 0), rollout, texts, ["<think>"] * len(problems))


def make_way(samples=5, problems=2):
    return Round(samples, problems, FakeRollout(problems, samples))


def test_every_problem_gets_its_samples_however_they_are_cut_up():
    expected = [[f"<think>seed 3 prompt {p} sample {s} of p{p}" for s in range(5)] for p in range(7)]
    for problems in (1, 2, 4, 7, 8):
        done = answer_set(make_way(5, problems), None, PROBLEMS, Checkers(), seed=3)
        assert [answered.problem for answered in done] == PROBLEMS
        assert [[response.text for response in answered.responses] for answered in done] == expected


def test_lengths_and_truncation_are_those_of_the_row():
    done = answer_set(make_way(2, 3), None, PROBLEMS[:3], Checkers(), seed=0)
    assert [[(one.tokens, one.truncated) for one in answered.responses] for answered in done] == [
        [(1, False), (2, False)], [(3, True), (1, False)], [(2, False), (3, True)],
    ]  # fmt: skip


def test_done_problems_are_not_sampled_again_and_batches_begin_where_they_began(tmp_path):
    path = tmp_path / "set.jsonl"
    generate_set(path, make_way(), None, PROBLEMS, Checkers(), seed=0)
    whole = path.read_bytes()
    for lines in range(8):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
        way, advanced = make_way(), []
        generate_set(path, way, None, PROBLEMS, Checkers(), seed=0, advance=advanced.append)
        assert path.read_bytes() == whole and sum(advanced) == 7
        first = lines - lines % 2 if lines < 7 else 7
        assert way.rollout.calls == list(range(first, 7, 2))


def test_a_batch_is_judged_while_the_next_is_sampled():
    second_began, judged_first = threading.Event(), threading.Event()

    class Patient(Checkers):
        def submit(self, problem, response):
            if problem.id == "p0":
                assert second_began.wait(10)  # were it judged before the next is sampled, this would wait in vain
                judged_first.set()
            return super().submit(problem, response)

    way = make_way(1, 1)
    sample = way.rollout

    def rollout(params, problems, draw):
        if draw.first_prompt == 1:
            second_began.set()
            assert judged_first.wait(10)
        return sample(params, problems, draw)

    assert len(answer_set(way._replace(rollout=rollout), None, PROBLEMS[:2], Patient(), seed=0)) == 2


def test_what_goes_wrong_while_judging_is_not_lost(tmp_path):
    class Broken(Checkers):
        def submit(self, problem, response):
            if problem.id == "p3":
                raise RuntimeError("no worker could be started")
            return super().submit(problem, response)

    with pytest.raises(RuntimeError, match="no worker"):
        generate_set(tmp_path / "set.jsonl", make_way(), None, PROBLEMS, Broken(), seed=0)
    assert count_done(tmp_path / "set.jsonl") == 2  # p2 was in the batch with p3


def test_lines_are_written_by_the_rules_of_metrics(tmp_path):
    # One rule for text: `rewrite` goes through metrics.write_lines and `append` does not.
    path = write(tmp_path / "set.jsonl", DONE[:1])
    write_lines(tmp_path / "other.jsonl", [json.loads(Path(path).read_bytes())])
    assert (tmp_path / "other.jsonl").read_bytes() == path.read_bytes()
