"""What checking the responses of one iteration adds to it.

    python benchmarks/verification.py [--data FOLDER] [--workers N] [--rounds N]

128 problems of MATH-500 with 8 responses each, about 4,000 characters a response: text of reference solutions, and at the
end a box. Of each group 4 answers are the reference answer, two as it is written and two spelt otherwise; 4 differ from all
others of the group (answers of other problems, a changed reference answer), and of every tenth response the box is missing.
So half of a group's answers are alike, as sampled ones are, and the pool's memory for pairs gets no more than its due.

Prints the seconds that pass after the last response is in, each the median of rounds with new pools, and their share of an
iteration of a minute:

    at once   all 1024 come in together, one call of `score`: the whole of it is added
    streamed  they come in one after the other over some seconds, as groups finish, and are submitted as they come
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from dgpo_jax.rewards.extract import find_answer
from dgpo_jax.rewards.math import quick_status
from dgpo_jax.rewards.pool import VerifierPool

PROBLEMS, GROUP, CHARACTERS = 128, 8, 4_000
ITERATION_S = 60.0
SAMPLING_S = 10.0  # over which the streamed responses come in; a real iteration takes longer, which only helps


def make_responses(rows, seed=0):
    """(answer, response) pairs, whole groups one after the other."""
    draw = random.Random(seed)
    prose = " ".join(row["solution"] for row in rows).replace("\\boxed", "")
    golds = [row["answer"] for row in rows]
    pairs = []
    for row in draw.sample(rows, PROBLEMS):
        gold = row["answer"]
        wrong = [*draw.sample(golds, 2), f"{gold} + 1", f"\\frac{{{gold}}}{{2}}"]
        answers = [gold, gold, f"{gold} + 0", f"{gold} + 0", *wrong]
        draw.shuffle(answers)
        for answer in answers:
            start = draw.randrange(len(prose) - CHARACTERS)
            ending = "so I am not sure." if draw.random() < 0.1 else f"The answer is $\\boxed{{{answer}}}$."
            pairs.append((gold, f"{prose[start:start + CHARACTERS - len(ending)]} {ending}"))
    return pairs


def at_once(pool, pairs):
    """Seconds of one call of `score`, and its verdicts."""
    started = time.perf_counter()
    verdicts = pool.score(pairs)
    return time.perf_counter() - started, verdicts


def streamed(pool, pairs):
    """Seconds from the last response to the last verdict, and the verdicts."""
    tickets, began = [], time.perf_counter()
    for index, pair in enumerate(pairs):
        time.sleep(max(0.0, began + SAMPLING_S * index / len(pairs) - time.perf_counter()))
        last = time.perf_counter()
        tickets.append(pool.submit(*pair))
    verdicts = pool.gather(tickets)
    return time.perf_counter() - last, verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.data / "math500.jsonl").read_text().splitlines()]
    pairs = make_responses(rows)
    found = [(answer, find_answer(response)) for answer, response in pairs]
    compared = [(answer, text) for answer, text in found if text is not None]
    slow = [pair for pair in compared if quick_status(*pair) is None]
    print(
        f"{len(pairs)} responses of {statistics.mean(len(response) for _, response in pairs):.0f} characters; {len(compared)} with a box, "
        f"{len(slow)} of them for a worker, {len(set(slow))} different ones; {options.workers} workers"
    )
    print("\n| responses come in | seconds added, median (lowest to highest) | share of a minute | verdicts |\n|---|---|---|---|")
    for name, way in (("at once", at_once), ("streamed", streamed)):
        seconds = []
        for _ in range(options.rounds):
            with VerifierPool(workers=options.workers) as pool:
                pool.wait_started(120)
                taken, verdicts = way(pool, pairs)
            seconds.append(taken)
        counts = {status: sum(verdict.status == status for verdict in verdicts) for status in sorted({v.status for v in verdicts})}
        middle, words = statistics.median(seconds), ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"| {name} | {middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {100 * middle / ITERATION_S:.1f} % | {words} |")


if __name__ == "__main__":
    main()
