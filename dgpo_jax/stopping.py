"""Ending a run early without losing anything: signals, a time limit, a watchdog that has given up.

Whoever works asks at the points where work can be dropped: `chunk` between two chunks of decoding, `drawn` after a
rollout, `update` between two microbatches, `boundary` between two iterations. Once the run is to stop, the first of them
decides: if the rest of the iteration fits into the time that is left, it is finished, and `boundary` raises `Stop`; else
`Stop` is raised at once: a rollout or an evaluation under way is dropped, the updates made so far are kept. Either way it
goes up to the loop of `train`, which saves.

One process has Python's signal handlers. Several must stop at the same point although a signal may reach one of them only:
JAX's preemption service agrees on the number of a question that all of them still have before them
(`reached_preemption_sync_point`; a Python handler for SIGTERM would silence it). So all must count their questions
alike, while chunks of decoding differ in number: a rollout counts as CHUNKS questions, whatever it takes.
"""

import os
import signal
import sys
import threading
import time

from jax.experimental import multihost_utils

from dgpo_jax import activity, hosts

CHUNKS = 4096  # questions that a rollout counts as; one of more chunks asks no more
FINISHING_SHARE = 0.5  # of the grace period may go into finishing; the rest is for the checkpoint


class Stop(Exception):  # noqa: N818 (no error: what was asked for)
    """The run ends here; what is under way is dropped."""


class Stopping:
    """Answers whether to stop. A context manager: inside it a signal no longer ends the process.

    Args:
        grace_seconds: from the signal to the kill that will follow it.
        limit_seconds: from now on, beyond which no iteration should go; 0 = none.
    """

    def __init__(self, grace_seconds: float = 0.0, limit_seconds: float = 0.0):
        self.reason = ""  # why the run stops; "" while it does not
        self._grace, self._limit = grace_seconds, limit_seconds
        self._began = self._asked = time.monotonic()
        self._signalled: float | None = None  # when a signal came, on the clock
        self._question = 0
        self._chunks = 0  # asked about in this rollout
        self._finishing = False  # the rest of the iteration is known to fit
        self._iteration: float | None = None  # when the one under way began
        self._whole = True  # it began at its beginning
        self._seconds: float | None = None  # that the one before took, evaluation and all
        self._handlers = {}  # before ours

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT) if hosts.count() == 1 else (signal.SIGINT,)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def request(self, reason: str) -> None:
        """Has the run stop, from any thread and any one of several processes."""
        if self._signalled is None:
            self._signalled = time.monotonic()
            if hosts.count() == 1:
                self.reason = reason
            else:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of

    def _on_signal(self, number: int, _) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._signalled is not None:
            raise KeyboardInterrupt
        if not self._question and hosts.count() == 1:
            print(f"\n{name}: stopped before anything had begun", file=sys.stderr, flush=True)
            self.reason = name
            raise Stop  # from wherever it was, as Ctrl-C does: a compilation is not waited for
        again = "; once more leaves at once" if number == signal.SIGINT else ""
        print(f"\n{name}: the run saves and stops{again}", file=sys.stderr, flush=True)
        self.request(name)

    def chunk(self) -> None:
        """Between two chunks of decoding. May raise Stop."""
        if self._chunks < CHUNKS:
            self._chunks += 1
            self._ask()

    def drawn(self) -> None:
        """After a rollout, also an empty one. May raise Stop."""
        if hosts.count() > 1:
            while self._chunks < CHUNKS:
                self.chunk()
        self._chunks = 0

    def update(self) -> None:
        """Before an optimizer step, or a microbatch of one. May raise Stop."""
        self._ask()

    def boundary(self, whole: bool = True) -> None:
        """Before an iteration, and after the last one. Raises Stop where no other should begin.

        Args:
            whole: False = a part of it was done before a restart, so that its time says nothing about the next one's.
        """
        now = time.monotonic()
        self._seconds = now - self._iteration if self._iteration is not None and self._whole else None
        self._iteration, self._whole = now, whole
        self._finishing = True  # nothing is under way
        self._ask()
        if not self.reason and self._limit:
            late = now + (self._seconds or 0.0) > self._began + self._limit
            if hosts.from_first(lambda: late):  # clocks differ
                self.reason = f"stop_after_minutes is {self._limit / 60:g}"
        if self.reason:
            raise Stop
        self._finishing = False

    def _ask(self) -> None:
        activity.beat()
        if hosts.count() > 1 and not self.reason:
            if multihost_utils.reached_preemption_sync_point(self._question):
                self.reason = "SIGTERM"
                self._signalled = self._asked  # or later: this is the safe side
            self._asked = time.monotonic()
        self._question += 1
        if self.reason and not self._finishing:
            if not hosts.from_first(self._fits):
                raise Stop
            self._finishing = True

    def _fits(self) -> bool:
        """Whether the iteration under way will end in time, if it takes as long as the one before; unknown once it has taken longer."""
        if self._seconds is None or self._iteration is None:
            return False
        end = self._iteration + self._seconds
        return time.monotonic() < end < self._signalled + FINISHING_SHARE * self._grace
