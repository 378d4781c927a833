"""What a response is worth: sums of reward functions by name, and a user's own."""

import numpy as np
import pytest
from scripted import SAYINGS as SAY
from scripted import config_for, in_order, to_rollout

from dgpo_jax.rewarding import make_rewards, reward_metrics, to_samples
from dgpo_jax.rewards.functions import BUILT_IN, Sample, Term, load_functions, parse_formula, total, values_of
from dgpo_jax.rollout import Responses
from dgpo_jax.types import Problem, Verdict

PROBLEM = Problem("p1", "1 + 1?", "2", "test")


def sample(response="", *, opening="", verdict=Verdict("correct", "2"), tokens=3, truncated=False):  # noqa: B008 - read only
    return Sample(PROBLEM, response, opening, verdict, tokens, truncated)


@pytest.mark.parametrize("text, expected", [
    ("answer", [("answer", 1)]),
    ("answer + 0.1 * think - 0.2*my_rewards:length", [("answer", 1), ("think", 0.1), ("my_rewards:length", -0.2)]),
    (" 2*answer+repetition ", [("answer", 2), ("repetition", 1)]),
    ("-a.b_c:d + 1e-3 * found", [("a.b_c:d", -1), ("found", 1e-3)]),
    ("answer - .5 * found", [("answer", 1), ("found", -0.5)]),
])  # fmt: skip
def test_a_sum_of_functions_is_read_with_its_weights(text, expected):
    assert parse_formula(text) == [Term(*term) for term in expected]


@pytest.mark.parametrize("text, complaint", [
    ("", "'' is no term"),
    ("answer +", "'' is no term"),
    ("answer * 2", "before '* 2' there must be"),
    ("answer think", "before 'think' there must be"),
    ("answer + -1 * think", "' -1 * think' is no term"),
    ("0.1 think", "'0.1 think' is no term"),
    ("answer + answer", "'answer' is there twice"),
    ("__import__('os')", "there must be"),
    ("1e400 * answer", "1e400 is beyond float32"),
])  # fmt: skip
def test_what_is_no_such_sum_is_refused_with_what_was_read(text, complaint):
    with pytest.raises(ValueError, match=r"reward\.functions is") as error:
        parse_formula(text)
    assert complaint in str(error.value)


def test_names_that_are_no_functions_are_refused_with_the_nearest_or_the_reason(tmp_path, monkeypatch):
    (tmp_path / "my_faulty_rewards.py").write_text("length = 3\n")
    (tmp_path / "my_broken_rewards.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, complaint in [
        ("repetitions", "perhaps 'repetition'"),
        ("my_missing_rewards:length", "cannot be imported (ModuleNotFoundError"),
        ("my_broken_rewards:length", "nowhere_to_be_found"),
        ("my_faulty_rewards:length", "has no function 'length'"),  # it is a number
    ]:
        with pytest.raises(ValueError) as error:
            load_functions([Term(name, 1.0)], answer=None)
        assert complaint in str(error.value)


def test_a_users_function_sees_the_sample_and_is_weighed(tmp_path, monkeypatch):
    (tmp_path / "my_good_rewards.py").write_text("def length(sample):\n    return sample.tokens + (sample.verdict.extracted == '2')\n")
    monkeypatch.syspath_prepend(tmp_path)
    formula = parse_formula("answer - 0.5 * my_good_rewards:length")
    functions = load_functions(formula, answer=lambda sample: 10.0)
    values = values_of(functions, [sample(tokens=3), sample(tokens=8, verdict=Verdict("no_answer", None))])
    assert {name: value.tolist() for name, value in values.items()} == {"answer": [10, 10], "my_good_rewards:length": [4, 8]}
    assert total(formula, values).tolist() == [8, 6] and total(formula, values).dtype == np.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, 1j, None, "1", [1.0]])
def test_a_function_that_returns_no_finite_number_ends_the_run_with_its_name(value):
    with pytest.raises(ValueError, match=r"reward function mine on a response to problem p1 returned .*; it must return a finite"):
        values_of({"mine": lambda sample: value}, [sample()])


def test_a_function_that_raises_ends_the_run_with_its_name():
    def mine(sample):
        return 1 / 0

    with pytest.raises(ValueError, match="reward function mine on a response to problem p1 raised ZeroDivisionError"):
        values_of({"mine": mine}, [sample()])


@pytest.mark.parametrize("response, opening, expected", [
    ("<think>so</think> 2", "", 1),
    ("so</think> 2", "<think>", 1),  # the prompt opened it, as R1-Distill's does
    ("so</think> 2", "", 0),  # never opened
    ("<think>so 2", "", 0),  # never closed
    ("<think>so</think>", "", 0),  # and then nothing
    ("<think> </think> 2", "", 0),  # no thought
    ("hm <think>so</think> 2", "", 0),  # began elsewhere
    ("<think>so</think><think>so</think> 2", "", 0),
    ("<think>so</think> 2", "<think>", 0),  # opened twice
    ("</think>so<think> 2", "", 0),
])  # fmt: skip
def test_think_wants_one_thought_and_an_answer_after_it(response, opening, expected):
    assert BUILT_IN["think"](sample(response, opening=opening)) == expected


@pytest.mark.parametrize("words, expected", [
    (0, 0),
    (19, 0),  # no run of 20
    (40, 20 / 21),  # of 21 runs of the same word one is new
])  # fmt: skip
def test_repetition_is_the_share_of_runs_of_words_that_were_there_before(words, expected):
    assert BUILT_IN["repetition"](sample("so " * words)) == pytest.approx(expected)


def test_text_without_repetition_has_none():
    assert BUILT_IN["repetition"](sample(" ".join(map(str, range(100))))) == 0


def test_found_is_one_for_any_answer():
    assert [BUILT_IN["found"](sample(verdict=Verdict(*verdict))) for verdict in (("wrong", "3"), ("no_answer", None))] == [1, 0]


def reward(settings, *verdicts):
    config = config_for(settings)
    problems = in_order(["r" * len(verdicts)]).take(0, 1)
    responses = Responses(problems, None, to_rollout([SAY["r"]] * len(verdicts)), ["x"] * len(verdicts), [""])
    worth = make_rewards(config)(responses, verdicts)
    return worth, reward_metrics(config, worth.terms, to_samples(responses, verdicts))


PARTLY, WHOLLY, WRONG = Verdict("wrong", "program", 0.25), Verdict("correct", "program", 1.0), Verdict("wrong", "3")


def test_a_program_that_passes_some_tests_earns_its_share_between_wrong_and_right():
    worth, metrics = reward({"reward.incorrect": -1.0, "reward.correct": 3.0}, PARTLY, WHOLLY, WRONG)
    assert worth.rewards.tolist() == [0.0, 3.0, -1.0] and worth.scores.tolist() == [0.25, 1.0, 0.0]
    assert metrics == {"reward/answer": pytest.approx(2 / 3)}


def test_under_hard_grading_some_tests_are_none():
    worth, _ = reward({"code.grade": "hard"}, PARTLY, WHOLLY)
    assert worth.rewards.tolist() == [0.0, 1.0] and worth.scores.tolist() == [0.0, 1.0]


def test_the_mean_of_every_function_is_logged_before_its_weight():
    worth, metrics = reward({"reward.functions": "answer + 0.5 * found"}, WHOLLY, Verdict("no_answer", None))
    assert worth.rewards.tolist() == [1.5, 0.0]
    assert metrics == {"reward/answer": 0.5, "reward/found": 0.5}


def test_an_unknown_function_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="perhaps 'think'"):
        make_rewards(config_for({"reward.functions": "answer + thinks"}))


