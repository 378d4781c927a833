"""reasoning-gym's puzzles: what becomes of a set, and what an answer can and cannot do to its scorer."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from dgpo_jax.data import gym as gym_data
from dgpo_jax.data.gym import gym_problems, pack, parse_set
from dgpo_jax.rewards import gym_worker
from dgpo_jax.rewards.extract import BOX_CAP
from dgpo_jax.rewards.gym import ANSWER_CAP, GymPool, find_gym_answer

ROOT = Path(__file__).resolve().parents[1]
HASH_SEED = os.environ.get("PYTHONHASHSEED", "random")
# The sets whose scorers hand an answer to eval or to SymPy's parse_expr.
EXECUTING = (
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24", "polynomial_multiplication",
    "simple_integration", "intermediate_integration",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """Spares the second process that sees whether items depend on the hash seed; one test has it, and all probes."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(gym_data, "PROBED", 2)


def first(name, split="train"):
    return gym_problems(name, split, 1, 0)[0]


def in_tags(answer):
    return f"<think>hm</think> <answer>{answer}</answer>"


# Problems


def test_a_problem_holds_what_its_scorer_needs():
    problem = first("chain_sum(min_terms=2,max_terms=2)")
    tests = json.loads(problem.tests)
    assert (problem.id, problem.source, problem.checker) == ("gym-chain_sum-train-000000", "gym:chain_sum/train", "gym")
    assert (tests["dataset"], tests["config"]) == ("chain_sum", {"min_terms": 2, "max_terms": 2})
    entry = gym_worker.unpack(tests["entry"])
    assert (entry["question"], entry["answer"]) == (problem.problem, problem.answer)
    numbers = entry["metadata"]["expression"].split(" ")
    assert len(numbers) == 3 and int(problem.answer) == int(numbers[0]) + int(numbers[1] + numbers[2])


def test_a_set_that_names_no_answer_has_an_empty_one():
    assert first("graph_color").answer == ""


def test_items_are_the_same_every_time_in_any_order():
    problems, again = gym_problems("gcd,lcm", "train", 30, 5), gym_problems("gcd,lcm", "train", 30, 5)
    assert [again[i] for i in reversed(range(30))] == list(reversed(problems[:]))
    assert len(problems) == 30 and problems[-1] == problems[29] and problems[3:5] == [problems[3], problems[4]]
    assert gym_problems("gcd,lcm", "train", 30, 6)[:] != problems[:]
    with pytest.raises(IndexError):
        problems[30]


def test_several_sets_take_turns_and_ids_stay_apart():
    problems = gym_problems("gcd, lcm,chain_sum(max_terms=3)", "train", 7, 0)
    expected = [f"gym:{name}/train" for name in ("gcd", "lcm", "chain_sum", "gcd", "lcm", "chain_sum", "gcd")]
    assert [problem.source for problem in problems] == expected
    assert len({problem.id for problem in problems}) == 7


@pytest.mark.parametrize("name", ["gcd(max_value=40)", "chain_sum(min_terms=2,max_terms=2,max_digits=1)"])
def test_no_question_is_in_both_splits_whatever_the_seed(name):
    """Both have few enough questions that two seeds alone would give the same ones again and again."""
    train = [problem.problem for problem in gym_problems(name, "train", 300, 0)]
    test = [problem.problem for problem in gym_problems(name, "test", 60, 1)]
    assert len({*train}) < 300 and not {*train} & {*test}


@pytest.mark.parametrize("text, expected", [
    ("gcd", ("gcd", {})),
    (" gcd ( ) ", ("gcd", {})),
    ("gcd(min_numbers=2, max_value=0)", ("gcd", {"min_numbers": 2, "max_value": 0})),
    ("chain_sum(allow_negation=true)", ("chain_sum", {"allow_negation": True})),
    ("coin_flip(allow_idk=False)", None),  # reasoning-gym has no such setting
    ("basic_arithmetic(format_style='simple')", ("basic_arithmetic", {"format_style": "simple"})),
    ("maze(min_dist=1.5)", ("maze", {"min_dist": 1.5})),
])  # fmt: skip
def test_settings_are_plain_values(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match="sets nothing that it has"):
            parse_set(text)
    else:
        assert parse_set(text) == expected


@pytest.mark.parametrize("name, message", [
    ("chain_sums", "no set 'chain_sums' that can be used here; perhaps chain_sum or "),
    ("composite", "join the sets themselves with ','"),
    ("chain_sum(min_term=2)", "'min_term=2' sets nothing that it has; perhaps min_terms or "),
    ("chain_sum(min_terms)", "'min_terms' sets nothing"),
    ("chain_sum(min_terms=2", r"not NAME or NAME\(setting=value, ...\); mind the brackets"),
    ("chain_sum(min_terms=9,max_terms=2)", "reasoning-gym refuses .*max_terms"),
    ("chain_sum(min_terms=few)", "reasoning-gym refuses"),
    ("chain_sum(seed=3)", "seed is not set here; set seed"),
    ("gcd,", "not NAME or NAME"),
    ("game_of_life_halting", "its scorer gives 'no answer' full marks"),  # True or anything else, of release 0.1.25
    ("gcd,coin_flip(min_trials=1,max_trials=0)", "coin_flip: reasoning-gym refuses"),
])  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        gym_problems(name, "train", 3, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split, size, seed", [("validation", 3, 0), ("train", 0, 0), ("train", 3, -1)])
def test_a_split_size_or_seed_out_of_range_is_refused(split, size, seed):
    with pytest.raises(ValueError, match="gcd/" + split):
        gym_problems("gcd", split, size, seed)


def test_a_split_without_a_question_is_refused(monkeypatch):
    monkeypatch.setattr(gym_data, "TEST_SHARE", 1)  # every question belongs to the test split
    with pytest.raises(ValueError, match="gcd/train: none of 16 items is a question of this split"):
        gym_problems("gcd", "train", 3, 0)


def test_items_that_differ_each_time_are_refused(monkeypatch):
    from reasoning_gym.arithmetic.gcd import GCDDataset

    make, made = GCDDataset.__getitem__, []

    def make_another(self, index):
        made.append(index)
        return {**make(self, index), "answer": str(len(made))}

    monkeypatch.setattr(GCDDataset, "__getitem__", make_another)
    with pytest.raises(ValueError, match="gcd: its items differ each time they are made"):
        gym_problems("gcd", "train", 3, 0)


@pytest.mark.skipif(HASH_SEED == "0", reason="this process has the other one's hash seed")
def test_items_that_depend_on_the_hash_seed_are_refused_unless_it_is_fixed(monkeypatch):
    assert len(gym_problems("ransom_note", "train", 3, 0)) == 3  # here it is, says the environment
    monkeypatch.undo()
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert len(gym_problems("gcd", "train", 3, 0)) == 3
    with pytest.raises(ValueError, match=r"ransom_note: its items depend on Python's hash seed.* PYTHONHASHSEED=0"):
        gym_problems("ransom_note", "train", 3, 0)


@pytest.mark.parametrize("value", [
    {"a": [1, 2.5, True, None, "x"], "b": {}},
    (1, (2, [(3,)])),  # JSON alone would make them lists
    {1: {2: (3,)}, "1": 0},  # JSON alone would make 1 a text, and one key of two
    [Fraction(1, 3)],
    {gym_data.TYPE: "tuple", "of": [1]},  # looks like a packed tuple, and is none
    {(0, 1): "a tuple as a key"},
])  # fmt: skip
def test_an_item_comes_out_of_json_as_it_went_in(value):
    out = gym_worker.unpack(json.loads(json.dumps(pack(value, "gym:x"))))
    assert out == value and repr(out) == repr(value)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="gym:x: its items hold a set, which JSON cannot keep"):
        pack({"a": [{1, 2}]}, "gym:x")


# Answers


@pytest.mark.parametrize("response, answer", [
    ("<answer> 4 </answer>", "4"),
    ("<answer>1 2\n3 4</answer>", "1 2\n3 4"),  # a board
    (r"<answer>4</answer> \boxed{5}", "4"),  # the tag comes first
    ("<answer>3</answer> no: <answer>4</answer>", "4"),
    ("<answer>3 <answer>4</answer>", "4"),
    ("<answer>3</answer> <answer>4", "3"),  # the last that is closed
    (r"\boxed{5} <answer>4", "5"),
    (r"</answer> \boxed{5}", "5"),
    ("<answer></answer>", None),
    ("<think><answer>3</answer></think> 4", None),  # weighed and dropped
    ("<think><answer>3</answer>", None),
    ("4", None),
])  # fmt: skip
def test_an_answer_stands_in_its_tag_after_the_thought_or_where_the_rule_says(response, answer):
    assert find_gym_answer(response, "boxed") == answer


def test_the_rule_is_the_users():
    assert find_gym_answer("so it is 4", "last") == "4" and find_gym_answer("the answer is 4.", "marked") == "4"
    with pytest.raises(ValueError, match="extract: 'box' is not a rule"):
        GymPool(extract="box")


def test_an_answer_is_found_in_time_that_grows_with_the_text_only():
    began = time.process_time()
    for text in ("<answer>" * 200_000, "</answer>" * 200_000, "<answer>" * 100_000 + "</answer>" * 100_000):
        find_gym_answer(text, "boxed")
    assert time.process_time() - began < 2


@pytest.fixture(scope="module")
def pool():
    with GymPool(workers=2, deadline_s=20.0) as pool:
        assert pool.wait_started(60)
        yield pool


@pytest.fixture
def unboxed(monkeypatch, tmp_path):
    """A pool on a machine without bubblewrap, with little time for an answer."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with GymPool(workers=1, deadline_s=6.0) as pool:
        assert pool.wait_started(60)
        yield pool


def judge(pool, problem, answer):
    return pool.submit(problem.tests, in_tags(answer)).result()


def test_reference_answers_are_right_by_their_own_scorers(pool):
    names = (*EXECUTING[:-1], "chain_sum", "bitwise_arithmetic", "number_sorting", "gsm_symbolic", "advanced_geometry", "sudoku")
    problems = [*gym_problems(",".join(names), "train", len(names), 3)]
    assert pool.check_golds(problems) == {}
    verdict = judge(pool, problems[-1], problems[-1].answer)
    assert (verdict.status, verdict.share, verdict.score) == ("correct", 1.0, 1.0)
    wrong = problems[-1]._replace(answer="1")
    assert list(pool.check_golds([wrong, first("graph_color")])) == [wrong.id]  # the second has no reference answer


def test_a_score_between_is_a_share_and_no_right_answer(pool):
    problem = first("string_insertion")
    verdict = judge(pool, problem, str(list(problem.answer)))  # a list of its letters is worth a tenth
    assert (verdict.status, verdict.share, verdict.correct) == ("wrong", 0.1, False)
    assert judge(pool, first("puzzle24"), "1 + 1").share == 0.01


@pytest.mark.parametrize("name, answer", [
    ("simple_integration", "exp(2*x)*sin(x)/2 + sqrt(x) + C"),
    ("countdown", "(1 + 2)*3 - 4/5"),
    ("n_queens", "[['Q', '_'], ['_', 'Q']]"),
    ("spiral_matrix", "[1, 2, 3]"),
])  # fmt: skip
def test_plain_mathematics_in_a_wrong_answer_is_read_and_wrong(pool, name, answer):
    assert judge(pool, first(name), answer).status == "wrong"


def test_what_a_scorer_fails_on_is_unparsable(pool):
    assert judge(pool, first("prime_factorization"), "two times three").status == "unparsable"  # int("two times three")
    assert judge(pool, first("gcd"), "1" * (ANSWER_CAP + 1)) == ("unparsable", "1" * BOX_CAP, None)


def test_without_an_answer_nobody_is_asked(pool):
    assert pool.submit("no JSON at all", "hm").result() == ("no_answer", None, None)


def test_a_fault_of_the_checker_is_not_the_answers(pool):
    assert pool.submit('{"dataset": "gcd"}', in_tags("4")).result().status == "crashed"


def test_a_late_answer_is_timed_out_and_the_next_one_judged(unboxed):
    problem = first("simple_integration")
    assert judge(unboxed, problem, "9**9**9**9").status == "timed_out"
    assert judge(unboxed, problem, problem.answer).correct


HOSTILE = (
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "[open('{file}', 'w') for _ in '1']",
    "sin(\"__import__('os').system('touch {file}')\")",  # SymPy's functions parse texts that they are given
    "(lambda: open('{file}', 'w'))()",
    "().__class__.__base__.__subclasses__()",
    "f'{{open(\"{file}\", \"w\")}}'",
)


@pytest.mark.parametrize("judges", ["pool", "unboxed"])
def test_an_answer_that_is_a_program_is_not_run(judges, request, tmp_path):
    judges, file = request.getfixturevalue(judges), tmp_path / "written"
    problems = gym_problems(",".join(EXECUTING), "train", len(EXECUTING), 0)
    judges.gather([judges.submit(problems[0].tests, in_tags("1")) for _ in range(4)])  # all workers are there
    pids = judges.worker_pids()
    tickets = [judges.submit(problem.tests, in_tags(text.format(file=file))) for problem in problems for text in HOSTILE]
    assert {verdict.status for verdict in judges.gather(tickets)} == {"wrong"} and not file.exists()
    assert judges.worker_pids() == pids  # nothing reached the second wall, at which a worker ends


def test_the_tame_eval_and_parse_expr_do_what_honest_scorers_need():
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    tame = gym_worker.tame_parse_expr(parse_expr)
    assert gym_worker.plain_eval("((0x12 + 3) << 2) - -1") == 85
    assert gym_worker.plain_eval(" [['a', 1.5], (None,)]") == [["a", 1.5], (None,)]
    assert tame("2*x**2 + sin(pi*y)/3") == 2 * sympy.Symbol("x") ** 2 + sympy.sin(sympy.pi * sympy.Symbol("y")) / 3
    assert tame("z + C", local_dict={"z": sympy.Symbol("q")}) == sympy.Symbol("q") + sympy.Symbol("C")
    refused = ("x.real", "preview(x)", "'1'", "open", "_x", "sin(x, evaluate=x)", "[i for i in x]", "lambda: 1", "x := 1", "S(1)")
    for text in refused:
        with pytest.raises((ValueError, SyntaxError)):
            tame(text)
    for text in ("x", "f(1)", "[].append", "[1][0]", "1 if 1 else 2", "f'{1}'"):
        with pytest.raises((ValueError, SyntaxError)):
            gym_worker.plain_eval(text)


ACTIONS = """
import os, pickle, socket, subprocess, sys
import sympy
from dgpo_jax.rewards import gym_worker

def late_import():
    import sched  # makes a named tuple, and so runs text of its own

file, x = sys.argv[1], sympy.Symbol("x")
actions = {
    "arithmetic": lambda: 1 + 1, "late import": late_import, "read": lambda: open(gym_worker.__file__).close(),
    "plain_eval": lambda: gym_worker.plain_eval("[1 + 2]"), "cancel": lambda: sympy.cancel((x**2 - 1) / (x - 1)),
    "eval": lambda: eval("1 + 1"), "exec": lambda: exec("x = 1"), "compile": lambda: compile("1", "<string>", "eval"),
    "sympify": lambda: sympy.sympify("x + 1"),
    "write": lambda: open(file, "w"), "os.open": lambda: os.open(file, os.O_CREAT | os.O_WRONLY),
    "system": lambda: os.system("touch " + file), "program": lambda: subprocess.run(["touch", file]),
    "fork": os.fork, "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "pickle": lambda: pickle.loads(pickle.dumps(len)),
}
gym_worker.watch()
for name, action in actions.items():
    child = os.fork()
    if child == 0:
        try:
            with gym_worker._Watched():
                action()
        except BaseException:
            os._exit(2)  # refused by something else than the watch
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ")
"""


def test_what_no_scorer_needs_ends_the_worker(tmp_path):
    """The second wall, alone: nothing is tamed and there is no box."""
    done = subprocess.run(
        [sys.executable, "-c", ACTIONS, str(tmp_path / "written")], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    ended = dict(line.split(": ") for line in done.stdout.splitlines())
    allowed = ("arithmetic", "late import", "read", "plain_eval", "cancel")
    assert len(ended) == 16 and ended == {name: "0" if name in allowed else "1" for name in ended}, done.stderr
    assert not (tmp_path / "written").exists()


def box_works():
    box = shutil.which("bwrap")
    return bool(box) and subprocess.run([box, *gym_worker._BOX, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not box_works(), reason="bubblewrap does not work on this machine")
def test_the_box_lets_nothing_be_written_and_nobody_be_reached(pool, tmp_path):
    """The third wall, alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # from outside it is there
        script = (
            "import socket\n"
            f"write = lambda: open({str(tmp_path / 'written')!r}, 'w')\n"
            f"reach = lambda: socket.create_connection(('127.0.0.1', {port}))\n"
            "for act in (write, reach):\n"
            "    try: act(); print('done')\n"
            "    except OSError as error: print(type(error).__name__)"
        )
        command = ["bwrap", *gym_worker._BOX, sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True)
    assert "done" not in done.stdout and len(done.stdout.split()) == 2, done.stderr
    judge(pool, first("gcd"), "1")
    assert all("bwrap" in Path(f"/proc/{pid}/cmdline").read_text() for pid in pool.worker_pids())


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in children for found in (int(child), *descendants(child))]


def test_no_process_stays_when_the_pool_is_closed():
    with GymPool(workers=1) as pool:
        assert pool.wait_started(60)
        everybody = [*pool.worker_pids(), *(child for pid in pool.worker_pids() for child in descendants(pid))]
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in everybody) and time.monotonic() < end:
        time.sleep(0.05)
    assert everybody and not any(Path(f"/proc/{pid}").exists() for pid in everybody)
