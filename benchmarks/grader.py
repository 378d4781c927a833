"""Our grader against Math-Verify, on the same responses, one worker process each, in one run.

    pip install --target /tmp/peers math-verify         # or "dgpo_jax[peers]"; without it only our figures are printed
    PYTHONPATH=.:/tmp/peers python benchmarks/grader.py [--data FOLDER] [--cases FOLDER] [--rounds N]

FOLDER of --data (../shared/data unless given) holds math500.jsonl and gsm8k_test.jsonl; that of --cases (../shared/verify)
cases.jsonl and hostile.jsonl, and is left out where it is not there. Prints Markdown tables:

    throughput  answers a second through VerifierPool(workers=1) and MathVerifyPool(workers=1), the two in turns, median of
                rounds. Each round takes new pools, so that nothing is remembered; the start of a worker is not counted. What
                strings and numbers settle, VerifierPool settles before its worker is asked: that counts as ours.
                MATH-500: the reference solution as response, and the solution of another problem with a different answer.
                GSM8K: the solution, its answer in a box at the end.
    latency     of one answer in this process, without a pool: what `check` costs.
    accuracy    on cases.jsonl, the undisputed ones, and hostile.jsonl.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from dgpo_jax.rewards.math import check
from dgpo_jax.rewards.math_verify import MathVerifyPool, installed
from dgpo_jax.rewards.pool import VerifierPool

TRUNCATED_LENGTH = 16_000  # characters of a response that ran out of tokens before its box
WARM_UP = [("x+1", r"\boxed{1+x}"), (r"\frac{1}{2}", r"\boxed{\sqrt{2}}")]


def read(path):
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_sets(data):
    """{name: (answer, response) pairs}, and {name: whether every pair of it is right}."""
    math, gsm = read(data / "math500.jsonl"), read(data / "gsm8k_test.jsonl")
    shifted = math[250:] + math[:250]
    others = [next(b for b in [*shifted[i:], *shifted[:i]] if b["answer"] != a["answer"]) for i, a in enumerate(math)]
    sets = {
        "MATH-500, reference solutions": [(row["answer"], row["solution"]) for row in math],
        "MATH-500, solutions of other problems": [(a["answer"], b["solution"]) for a, b in zip(math, others, strict=True)],
        "GSM8K, boxed": [(row["answer"], f"{row['solution'].split('####')[0]}\\boxed{{{row['answer']}}}") for row in gsm],
    }
    return sets, dict(zip(sets, (True, False, True), strict=True))


def grade(make_pool, pairs):
    """(seconds, verdicts as words) of one pool of one worker on these pairs, none of which it has seen."""
    with make_pool() as pool:
        for ticket in [pool.submit(*pair) for pair in WARM_UP]:
            ticket.result()
        started = time.perf_counter()
        results = [ticket.result() for ticket in [pool.submit(*pair) for pair in pairs]]
        return time.perf_counter() - started, [getattr(result, "status", result) for result in results]


def ours():
    return VerifierPool(workers=1)


def theirs():
    return MathVerifyPool(workers=1)


def print_throughput(sets, expected, rounds):
    """Also what each grader said, since a fast wrong verdict is worth nothing."""
    graders = {"ours": ours, "Math-Verify": theirs} if installed() else {"ours": ours}
    print("| responses | ours, answers a second | Math-Verify | ratio, median (lowest to highest) | ours as expected | Math-Verify |")
    print("|---|---|---|---|---|---|")
    for name, pairs in sets.items():
        seconds, agreed = {grader: [] for grader in graders}, {}
        for _ in range(rounds):
            for grader, make_pool in graders.items():
                taken, verdicts = grade(make_pool, pairs)
                seconds[grader].append(taken)
                agreed[grader] = f"{sum((verdict == 'correct') == expected[name] for verdict in verdicts)} of {len(pairs)}"
        speed = {grader: f"{len(pairs) / statistics.median(taken):,.0f}" for grader, taken in seconds.items()}
        ratios = [b / a for a, b in zip(seconds["ours"], seconds.get("Math-Verify", []), strict=False)]
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "-"
        print(f"| {name} | {speed['ours']} | {speed.get('Math-Verify', '-')} | {ratio} | {agreed['ours']} | {agreed.get('Math-Verify', '-')} |")


def latencies(pairs):
    """Sorted milliseconds of `check` for each pair, seen for the first time but for the reference answer."""
    taken = []
    for answer, response in pairs:
        started = time.perf_counter()
        check(answer, response)
        taken.append(1000 * (time.perf_counter() - started))
    return sorted(taken)


def print_latency(sets):
    solutions = "\n".join(response for _, response in sets["MATH-500, reference solutions"]).replace("\\boxed", "")
    starts = range(0, min(len(solutions) - TRUNCATED_LENGTH, 300_000), 1_000)
    unboxed = [("42", solutions[start:start + TRUNCATED_LENGTH]) for start in starts]
    print("\n| one answer, in this process | p50, ms | p99 | largest |\n|---|---|---|---|")
    for pair in WARM_UP:
        check(*pair)
    for name, pairs in {**sets, f"{TRUNCATED_LENGTH:,} characters without a box": unboxed}.items():
        taken = latencies(pairs)
        print(f"| {name} | {taken[len(taken) // 2]:.3f} | {taken[len(taken) * 99 // 100]:.3f} | {taken[-1]:.3f} |")


def print_accuracy(cases):
    """Both get the same text: the answer of each undisputed case in a box, the hostile strings as they are."""
    core = [case for case in read(cases / "cases.jsonl") if case["verdict_class"] == "core"]
    hostile = read(cases / "hostile.jsonl")
    texts = ["".join(part * times for part, times in case["prediction_parts"]) for case in hostile]
    table = [
        ("undisputed cases", [(c["gold"], c["boxed_prediction"]) for c in core], [c["expected_verdict"] for c in core]),
        ("hostile strings", list(zip([c["gold"] for c in hostile], texts, strict=True)), [c["expect"] for c in hostile]),
    ]
    print("\n| cases | grader | as expected | wrongly right | wrongly not right | late or dead | longest, s |\n|---|---|---|---|---|---|---|")
    for name, pairs, expected in table:
        for grader, make_pool in (("ours", ours), ("Math-Verify", theirs)):
            if grader == "ours" or installed():
                print_one_accuracy(name, grader, make_pool, pairs, expected)


def print_one_accuracy(name, grader, make_pool, pairs, expected):
    seconds, right = [], []
    with make_pool() as pool:
        pool.submit(*WARM_UP[0]).result()
        for pair in pairs:  # one at a time, so that each has its own time
            started = time.perf_counter()
            result = pool.submit(*pair).result()
            seconds.append(time.perf_counter() - started)
            right.append(getattr(result, "status", result))
    definite = [(verdict == "correct", want) for verdict, want in zip(right, expected, strict=True) if want is not None]
    failed = sum(verdict in ("timed_out", "crashed") for verdict in right)
    agreeing = sum(got == want for got, want in definite)
    too_kind, too_strict = definite.count((True, False)), definite.count((False, True))
    print(f"| {name} | {grader} | {agreeing} of {len(definite)} | {too_kind} | {too_strict} | {failed} | {max(seconds):.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cases", type=Path, default=Path("../shared/verify"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sets, expected = load_sets(options.data)
    print_throughput(sets, expected, options.rounds)
    print_latency(sets)
    if options.cases.is_dir():
        print_accuracy(options.cases)


if __name__ == "__main__":
    main()
