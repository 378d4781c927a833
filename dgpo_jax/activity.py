"""What this process is doing, for whoever asks when nothing seems to move. Standard library only.

    with doing("verify", lambda: f"{len(tickets)} answers outstanding"):
        ...
        beat()                  # something has moved

What a library does for long without a word, such as writing a hundred gigabytes, is watched from outside: `doing(..., gauge=traffic)`.

Global, as a process has one life: what waits deep inside a library call need not be handed an object to say so.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_beats = itertools.count(1)


class _Entry(NamedTuple):
    what: str
    detail: Callable[[], str] | None
    gauge: Callable[[], Any] | None
    seen: list  # what the gauge showed last


_lock = threading.Lock()
_under_way: dict[int, list[_Entry]] = {}  # thread -> what it does, the innermost last
_last_beat, _count = time.monotonic(), 0


def beat() -> None:
    """Says that something has moved."""
    global _last_beat, _count
    _last_beat, _count = time.monotonic(), next(_beats)


def beats() -> int:
    """How often something has moved; looks at the gauges of what is under way."""
    with _lock:
        entries = [entry for of_thread in _under_way.values() for entry in of_thread if entry.gauge]
    for entry in entries:
        shown = entry.gauge()
        if entry.seen[-1] != shown:
            entry.seen[-1] = shown
            beat()
    return _count


def silence() -> float:
    """Seconds since the last beat."""
    return time.monotonic() - _last_beat


def traffic() -> int | None:
    """A gauge: MiB that this process has read and written so far (Linux; elsewhere None: it never moves)."""
    try:
        with open("/proc/self/io") as file:
            numbers = dict(line.split(": ") for line in file)
    except OSError:
        return None
    return (int(numbers["rchar"]) + int(numbers["wchar"])) >> 20  # what the watchdog itself writes is less than one


@contextlib.contextmanager
def doing(what: str, detail: Callable[[], str] | None = None, gauge: Callable[[], Any] | None = None) -> Iterator[None]:
    """Names what this thread does inside; entering and leaving it are beats.

    Args:
        detail: called, from another thread, only when somebody asks; such as how many answers are outstanding.
        gauge: called now and then, from another thread; when it shows something else than before, that is a beat.
    """
    thread = threading.get_ident()
    beat()
    with _lock:
        _under_way.setdefault(thread, []).append(_Entry(what, detail, gauge, [gauge() if gauge else None]))
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
    return "; ".join(", ".join(map(_word, entries)) for entries in threads) or "nothing that has a name"


def _word(entry: _Entry) -> str:
    return f"{entry.what} ({entry.detail()})" if entry.detail else entry.what
