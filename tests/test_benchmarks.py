"""Which sets a word names, and what is said of one that names none."""

import pytest

from dgpo_jax.data.benchmarks import BENCHMARKS, parse_sets
from dgpo_jax.data.problems import fingerprint
from dgpo_jax.types import Problem


@pytest.mark.parametrize("text, expected", [
    ("", []),
    ("aime24", [("aime24", "tfds:aime24/test")]),
    ("gsm8k, math500", [("gsm8k", "tfds:gsm8k/test"), ("math500", "tfds:math500/test")]),  # in this order
    ("mine=a.jsonl", [("mine", "a.jsonl")]),
    ("gsm8k=data/gsm8k_test.jsonl", [("gsm8k", "data/gsm8k_test.jsonl")]),  # a known name may have another source
    ("x=gym:spell(a=1)/test", [("x", "gym:spell(a=1)/test")]),  # only the first = divides
    ("mine=gym:chain_sum(min_terms=2,max_terms=3)/test,gsm8k", [  # a comma within parentheses divides nothing
        ("mine", "gym:chain_sum(min_terms=2,max_terms=3)/test"), ("gsm8k", "tfds:gsm8k/test"),
    ]),
    ("all", [(name, f"tfds:{name}/test") for name in BENCHMARKS]),
    ("all,mine=a.jsonl", [*((name, f"tfds:{name}/test") for name in BENCHMARKS), ("mine", "a.jsonl")]),
])  # fmt: skip
def test_a_list_of_sets_is_read(text, expected):
    assert parse_sets(text) == expected


@pytest.mark.parametrize("text, complaint", [
    ("aime2024", "no benchmark 'aime2024', perhaps 'aime24'"),
    ("gsm", "no benchmark 'gsm'"),
    ("my_problems.jsonl", "or give NAME=SOURCE"),  # a file needs a name
    ("gsm8k,gsm8k", "'gsm8k' twice"),
    ("all,gsm8k=mine.jsonl", "'gsm8k' twice"),
    ("a/b=x.jsonl", "'a/b' becomes a file name"),  # it would leave the folder
    ("gsm8k.greedy=x.jsonl", "becomes a file name"),  # it would meet the greedy responses to gsm8k
    ("=x.jsonl", "'' becomes a file name"),
    ("held_out=x.jsonl", "give NAME=SOURCE another name"),  # metrics of the held-out problems have that key
    ("mine=", "'mine' has no source"),
])  # fmt: skip
def test_a_list_that_cannot_be_meant_is_refused(text, complaint):
    with pytest.raises(ValueError, match=r"sets|benchmark") as refusal:
        parse_sets(text)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("field, value", [("checker", "gym"), ("tolerance", 0.01)])
def test_problems_that_are_judged_otherwise_have_another_fingerprint(field, value):
    problem = Problem("1", "2 + 2?", "4", "s")
    assert fingerprint([problem._replace(**{field: value})]) != fingerprint([problem])


def test_every_benchmark_is_a_set_that_can_be_loaded():
    problem_sets = pytest.importorskip("dgpo_jax.data.problem_sets")
    for name in BENCHMARKS:
        assert "test" in problem_sets.SETS[name].origins, name
    # and none that has a test split was forgotten
    assert {name for name, one in problem_sets.SETS.items() if "test" in one.origins} == set(BENCHMARKS)
