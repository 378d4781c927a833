"""Which training problems share words with a benchmark: an index of the benchmarks' n-grams."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dgpo_jax.data.deduplication import tokenise, words
from dgpo_jax.types import Problem


class Overlap(NamedTuple):
    """What a problem shares with the benchmark problem that it shares most with."""

    benchmark: str  # the set's name
    problem_id: str  # in that set
    text: str  # the longest run of words in common; of a short benchmark problem, all of it
    share: float  # of the benchmark problem's n-grams that are here too; 1 for a short one


class BenchmarkIndex:
    """Finds problems that share n words in a row with any problem of the benchmarks.

    A benchmark problem of fewer than n words is found where it is contained whole, its signs included: "Evaluate 5!"
    is not in "Evaluate 5 - 3".

    Args:
        benchmarks: set name -> its problems.
        n: words; Klear and the sets that it draws on use 9 (arXiv:2508.07629, section 2.1).
    """

    def __init__(self, benchmarks: Mapping[str, Iterable[Problem]], n: int):
        if n < 1:
            raise ValueError(f"n-grams of {n} words: give at least 1.")
        self.n = n
        self._ids: list[tuple[str, str]] = []  # (set, problem id) by number
        self._sizes: list[int] = []  # different n-grams of each
        self._grams: dict[tuple[str, ...], list[int]] = {}  # n-gram -> numbers of the problems that have it
        self._short: list[tuple[int, str]] = []  # (number, " its tokens ")
        for name, problems in benchmarks.items():
            for problem in problems:
                self._add(name, problem)

    def _add(self, name, problem):
        number = len(self._ids)
        self._ids.append((name, problem.id))
        grams = set(ngrams(words(problem.problem), self.n))
        self._sizes.append(len(grams))
        for gram in grams:
            self._grams.setdefault(gram, []).append(number)
        if not grams:
            self._short.append((number, f" {' '.join(tokenise(problem.problem))} "))

    def find(self, text: str) -> Overlap | None:
        """The worst overlap of a problem's text, or None; of several as bad, with the first benchmark problem."""
        found = words(text)
        hits = [(place, gram) for place, gram in enumerate(ngrams(found, self.n)) if gram in self._grams]
        if hits:
            shared = Counter(number for gram in {gram for _, gram in hits} for number in self._grams[gram])
            worst = min(shared, key=lambda number: (-shared[number] / self._sizes[number], number))
            start, length = longest_run([place for place, gram in hits if worst in self._grams[gram]])
            return Overlap(
                *self._ids[worst],
                " ".join(found[start : start + length + self.n - 1]),
                shared[worst] / self._sizes[worst],
            )
        if self._short:
            whole = f" {' '.join(tokenise(text))} "
            for number, short in self._short:
                if short in whole:
                    return Overlap(*self._ids[number], short.strip(), 1.0)
        return None


def ngrams(sequence: list[str], n: int) -> Iterable[tuple[str, ...]]:
    """Every n elements in a row, in order; none if there are fewer."""
    return zip(*(sequence[start:] for start in range(n)), strict=False)


def longest_run(places: list[int]) -> tuple[int, int]:
    """(first, length) of the longest run of successive numbers in an ascending list, the earliest of several."""
    best = start = places[0], 1
    for place in places[1:]:
        start = (start[0], start[1] + 1) if place == start[0] + start[1] else (place, 1)
        if start[1] > best[1]:
            best = start
    return best
