"""Can a reference answer be checked at all? One that only its own spelling would match would never be found right."""

from dgpo_jax.rewards import exact
from dgpo_jax.rewards.extract import find_answer
from dgpo_jax.rewards.normalise import is_words, normalise

WORDS_CAP = 5  # words of an answer in plain words; a longer one is prose, which nobody repeats to the letter
READABLE = ""
FLAWS = {
    "unparsable": "cannot be read as mathematics within the bounds",
    "wrong": "is not found equal to itself",
    "timed_out": "takes too long to compare (reward.deadline_s)",
    "crashed": "needs too much memory to compare (reward.memory_mb)",
}  # of comparing it with itself


def look(answer: str) -> str | None:
    """READABLE for a number or a few plain words; why not, for prose; None if only comparing it with itself would tell."""
    boxed = find_answer(answer) if "\\boxed" in answer else None
    text = normalise(boxed or answer)
    if is_words(text):
        length = len(text.split())
        return f"its answer is {length} words of prose: {quote(answer)}" if length > WORDS_CAP else READABLE
    return None if exact.read_number(text) is None else READABLE


def explain(answer: str, status: str) -> str:
    """Why an answer cannot be checked, of the status of comparing it with itself."""
    return f"its answer {FLAWS[status]}: {quote(answer)}"


def quote(text: str) -> str:
    """In one short line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
