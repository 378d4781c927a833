"""What this process is doing, for whoever asks when nothing seems to move. Standard library only.

    with doing("verify", lambda: f"{len(tickets)} answers outstanding"):
        ...
        beat()                  # something has moved

Global, as a process has one life: what waits deep inside a library call need not be handed an object to say so.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_lock = threading.Lock()
_under_way: dict[int, list[tuple[str, Callable[[], str] | None]]] = {}  # thread -> what it does, the innermost last
_last_beat = time.monotonic()


def beat() -> None:
    """Says that something has moved."""
    global _last_beat
    _last_beat = time.monotonic()


def silence() -> float:
    """Seconds since the last beat."""
    return time.monotonic() - _last_beat


@contextlib.contextmanager
def doing(what: str, detail: Callable[[], str] | None = None) -> Iterator[None]:
    """Names what this thread does inside; entering and leaving it are beats.

    Args:
        detail: called, from another thread, only when somebody asks; such as how many answers are outstanding.
    """
    thread = threading.get_ident()
    beat()
    with _lock:
        _under_way.setdefault(thread, []).append((what, detail))
    try:
        yield
    finally:
        with _lock:
            _under_way[thread].pop()
            if not _under_way[thread]:
                del _under_way[thread]
        beat()


def describe() -> str:
    """All that is under way: 'iteration 12, verify (3 answers outstanding)', other threads behind semicolons."""
    with _lock:
        first = threading.main_thread().ident
        threads = [list(entries) for _, entries in sorted(_under_way.items(), key=lambda item: item[0] != first)]
    return "; ".join(", ".join(_word(*entry) for entry in entries) for entries in threads) or "nothing that has a name"


def _word(what: str, detail: Callable[[], str] | None) -> str:
    return f"{what} ({detail()})" if detail else what
