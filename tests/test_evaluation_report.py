"""Tables that a reader is to trust: their numbers, their marks, and texts that would break them."""

import json
from collections import Counter

import pytest

from dgpo_jax.evaluation.differences import Change, Disagreement, disagreement_report, regrade_report
from dgpo_jax.evaluation.estimators import NO_VOTE, RIGHT, Estimate
from dgpo_jax.evaluation.in_training import name_figures, to_eval_rows
from dgpo_jax.evaluation.judging import GREEDY, SAMPLES, Answered, Judged
from dgpo_jax.evaluation.protocol import differences
from dgpo_jax.evaluation.report import (
    fenced,
    inline,
    mean_over_sets,
    percent,
    score_line,
    score_set,
    score_table,
    table,
    to_json,
    to_markdown,
)
from dgpo_jax.files import write_whole
from dgpo_jax.types import Problem, Verdict

PROBLEMS = [Problem(f"p{number}", "?", "1", "test") for number in range(4)]
RIGHT_ONE = Judged("yes", Verdict("correct", "1"), RIGHT, 3, False)
WRONG_ONE = Judged("no | `x`", Verdict("wrong", "2|`3`"), 1, 5, True)
SILENT = Judged("", Verdict("no_answer", None), NO_VOTE, 1, False)
SAID = {
    GREEDY: [
        Answered(problem, [one])
        for problem, one in zip(PROBLEMS, [RIGHT_ONE, WRONG_ONE, WRONG_ONE, SILENT], strict=True)
    ],
    SAMPLES: [Answered(problem, [RIGHT_ONE, WRONG_ONE]) for problem in PROBLEMS],
}
PROTOCOL = {
    "weights": "models/mine",
    "asking": {
        "weights": "0123abcd", "model": {"layers": 2, "rope_theta": 1e4}, "template": "chat", "system": "", "max_prompt": 64, "samples": 2, "seed": 0,
        "example_prompt": "<user>```?```",
        "sets": {"one": {"source": "a|b.jsonl", "problems": 4, "of": 9, "too_long": 0, "fingerprint": "ff00"}},
    },
    "grading": {"grader": "0.1.0+ab12cd34", "extract": "last"},
    "sessions": [{"date": "2026-01-02", "jax": "0.10"}],
}  # fmt: skip


@pytest.mark.parametrize("value, expected", [
    (Estimate(0.25, 0.125), "25.0 ± 12.5"),
    (Estimate(1.0, 0.0), "100.0 ± 0.0"),
    (Estimate(0.5, None), "50.0"),  # one problem
    (None, "-"),
])  # fmt: skip
def test_scores_are_in_percent_with_their_standard_error(value, expected):
    assert percent(value) == expected


def test_the_mean_of_sets_adds_up_independent_errors():
    assert mean_over_sets([Estimate(0.2, 0.03), Estimate(0.4, 0.04)]) == pytest.approx(
        Estimate(0.3, 0.025)
    )  # sqrt(9 + 16) / 2 percent
    assert mean_over_sets([Estimate(0.2, 0.03), None]) is None  # a mean over fewer sets would not compare
    assert mean_over_sets([Estimate(0.2, None), Estimate(0.4, 0.1)]) == Estimate(pytest.approx(0.3), None)


def test_scores_of_a_set_by_hand():
    one = score_set("one", SAID, unasked=0)
    assert (one.problems, one.samples) == (4, 2)
    assert {key: value.value for key, value in one.headline().items()} == {
        "greedy": 0.25, "avg@2": 0.5, "pass@2": 1.0, "best@2": 0.75, "maj@2": 0.5,
    }  # fmt: skip
    assert score_line(one, 12.3) == (
        "one           4 problems: greedy 25.0 ± 25.0, avg@2 50.0 ± 0.0, pass@2 100.0 ± 0.0, best@2 75.0 ± 0.0,"
        " maj@2 50.0 ± 0.0  (12 s)"
    )


def test_problems_that_were_not_asked_are_marked_and_counted():
    one = score_set("one", SAID, unasked=4)
    assert one.problems == 8 and one.headline()["avg@2"].value == 0.25
    text = to_markdown("mine", [one], PROTOCOL, [])
    assert "| one* |        8 |" in text and "*one: 4 of 8 problems do not fit into 64 tokens." in text


def test_the_first_problems_of_a_set_do_not_look_like_all_of_it():
    part, all_of_it = score_set("part", SAID, unasked=1, whole=500), score_set("all", SAID, unasked=1, whole=5)
    table = score_table([part, all_of_it])
    assert "| part*        | 5 of 500 |" in table and "| all*         |        5 |" in table
    assert score_line(part).startswith("part          5 of 500 problems: ")
    text = to_markdown("mine", [part, all_of_it], PROTOCOL, [])
    assert "part: the first 5 of 500 problems (eval.problems)" in text and "all: the first" not in text
    sets = json.loads(to_json([part, all_of_it], PROTOCOL, []))["sets"]
    assert (sets["part"]["of"], sets["all"]["of"]) == (500, 5)


def test_a_program_that_passes_some_of_its_tests_is_not_solved():
    half = Judged("def f(): ...", Verdict("wrong", "x", 0.5), NO_VOTE, 3, False)
    done = [Answered(problem._replace(checker="code"), [half]) for problem in PROBLEMS]
    one = score_set("code", {GREEDY: done, SAMPLES: done}, unasked=0)
    assert one.scores["greedy"].value == 0.0  # solved or not, as every text about it says
    assert one.scores["avg@1"].value == 0.5
    found, label = name_figures(GREEDY, "eval", done)
    assert (label, found["eval/greedy"]) == ("eval/greedy", 0.0)  # in training it is the same figure
    hard = score_set("code", {SAMPLES: done}, unasked=0, grade=lambda verdict: float(verdict.correct))
    assert hard.scores["avg@1"].value == 0.0  # code.grade=hard


def test_the_table_is_markdown_that_lines_up():
    assert table([["set", "n", "score"], ["a|b", 10, "1\n2"]]) == (
        "| set  |  n | score |\n"
        "|------|---:|------:|\n"
        "| a\\|b | 10 |   1 2 |\n"
    )  # fmt: skip
    assert table([["a", "b"], ["c", "dd"]], left=2) == "| a | b  |\n|---|----|\n| c | dd |\n"


def test_several_sets_have_a_mean_and_a_missing_score_is_a_dash():
    program = {SAMPLES: [Answered(problem._replace(checker="code"), [RIGHT_ONE, RIGHT_ONE]) for problem in PROBLEMS]}
    lines = score_table([score_set("one", SAID, 0), score_set("two", program, 0)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["set", "problems", "greedy", "avg@2", "pass@2", "best@2", "maj@2"]
    assert cells[3] == ["two", "4", "-", "100.0 ± 0.0", "100.0 ± 0.0", "100.0 ± 0.0", "-"]  # no greedy round, no votes
    assert cells[4] == ["mean of sets", "8", "-", "75.0 ± 0.0", "100.0 ± 0.0", "87.5 ± 0.0", "-"]


def test_the_report_states_the_protocol_and_the_prompt_to_the_letter():
    text = to_markdown("mine", [score_set("one", SAID, 0)], PROTOCOL, ["p3"])
    for part in (
        "Weights: models/mine.", "| grader ", "0.1.0+ab12cd34", "(fingerprint 0123abcd)",
        "a\\|b.jsonl, 4 of 9 problems, fingerprint ff00", "layers 2, rope_theta 10000.0",
        "date 2026-01-02, jax 0.10", "````text\n<user>```?```\n````", "1 reference answers do not equal themselves",
        "| one | maj@k",
        "**best@k**", "no multiples of 1/30",
    ):  # fmt: skip
        assert part in text, part


def test_in_training_a_response_has_a_score_and_no_reward():
    rows = to_eval_rows("eval/avg@2", SAID[SAMPLES][:1])
    assert [row["score"] for row in rows] == [1.0, 0.0] and "reward" not in rows[0]  # nothing is learned from it


def test_results_can_be_read_by_a_program():
    results = json.loads(to_json([score_set("one", SAID, 0)], PROTOCOL, ["p3"]))
    one = results["sets"]["one"]
    assert one["scores"]["greedy"] == {"value": 0.25, "standard_error": 0.25}
    assert one["scores"]["pass@1"] == {"value": 0.5, "standard_error": 0.0}
    assert one[GREEDY]["no_answer"]["value"] == 0.25 and one[SAMPLES]["truncated"]["value"] == 0.5
    assert results["protocol"] == PROTOCOL and results["answers_that_do_not_equal_themselves"] == ["p3"]


@pytest.mark.parametrize("text, expected", [
    ("plain", "```text\nplain\n```\n"),
    ("a ``` b", "````text\na ``` b\n````\n"),
    ("`````", "``````text\n`````\n``````\n"),
])  # fmt: skip
def test_text_cannot_end_its_block(text, expected):
    assert fenced(text) == expected


@pytest.mark.parametrize("text, expected", [("x", "`x`"), ("a `b`", "`` a `b` ``"), ("", "``")])
def test_text_cannot_end_its_code(text, expected):
    assert inline(text) == expected


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    write_whole(tmp_path / "report.md", "half \ud83d é")
    assert (tmp_path / "report.md").read_bytes() == b"half \\ud83d \xc3\xa9"


def test_a_regrade_lists_what_changed_and_both_scores():
    after = {GREEDY: SAID[GREEDY], SAMPLES: [Answered(problem, [RIGHT_ONE, RIGHT_ONE]) for problem in PROBLEMS]}
    change = Change("one", SAMPLES, 1, PROBLEMS[0], WRONG_ONE, Verdict("correct", "1"))
    text = regrade_report(
        [change],
        [score_set("one", SAID, 0)],
        [score_set("one", after, 0)],
        PROTOCOL["grading"],
        {"grader": "0.2", "extract": "last"},
    )
    assert "| grader  | 0.1.0+ab12cd34 | 0.2   |" in text
    assert "| one | avg@2  |  50.0 ± 0.0 | 100.0 ± 0.0 |" in text
    assert "| one | wrong -> correct |         1 |" in text
    assert "## one, p0, samples, sample 1: wrong -> correct" in text and "`` 2\\|`3` ``" in text and "no | `x`" in text


def test_disagreements_are_counted_by_kind_and_shown_with_the_end_of_the_response():
    long = WRONG_ONE._replace(text="start" + "." * 500 + "end")
    found = [
        Disagreement("one", GREEDY, 0, PROBLEMS[0], long, "correct"),
        Disagreement("one", SAMPLES, 1, PROBLEMS[1], SILENT, "correct"),
    ]  # fmt: skip
    text = disagreement_report(found, 40, Counter({"timed_out": 2}))
    assert "2 of 40 responses. It gave up 2 more (timed out)." in text
    assert "| one | ours no answer, theirs correct |         1 |" in text
    assert "[...]..." in text and "...end\n" in text and "start" not in text


@pytest.mark.parametrize("before, after, expected", [
    ({"a": 1}, {"a": 1}, []),
    ({"a": 1}, {"a": 2}, ["a was 1 and is 2"]),
    ({"sets": {"x": {"n": 1}}}, {"sets": {"x": {"n": 2}}}, ["sets.x.n was 1 and is 2"]),
    ({"a": 1}, {}, ["a was 1 and is None"]),
    ({}, {"a": 1}, ["a was None and is 1"]),
])  # fmt: skip
def test_what_differs_between_protocols_is_named(before, after, expected):
    assert differences(before, after) == expected
