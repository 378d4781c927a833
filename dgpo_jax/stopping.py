"""Ending a run early without losing anything: signals, a time limit, a watchdog that has given up.

Whoever works asks at the points where work can be dropped: `chunk` between two chunks of decoding, `drawn` after a
rollout, `checking` while answers are checked, `update` between two microbatches, `boundary` between two iterations. Once the
run is to stop, the first of them decides: if the rest of the iteration fits into the time that is left, it is finished, and
`boundary` raises `Stop`; else `Stop` is raised at once: a rollout or an evaluation under way is dropped, the updates made so
far are kept. What was to fit and does not is dropped when its time is over. Either way `Stop` goes up to the loop of
`train`, which saves.

One process has Python's signal handlers. Several must stop at the same point although a signal may reach one of them only:
JAX's preemption service agrees on the number of a question that all of them still have before them
(`reached_preemption_sync_point`; a Python handler for SIGTERM would silence it). So all must count their questions
alike, while chunks of decoding differ in number: a rollout counts as CHUNKS questions, whatever it takes. Who has fewer asks
the rest when all have drawn; earlier, all would have to stop behind the slowest rollout, and not amid it.
"""

import itertools
import os
import signal
import sys
import threading
import time

from jax.experimental import multihost_utils

from dgpo_jax import activity, hosts
from dgpo_jax.processes import STOPPED_EARLY

CHUNKS = 16384  # questions that a rollout of several processes counts as; one of more chunks asks no more
FINISHING_SHARE = 0.5  # of the grace period may go into finishing; the rest is for the checkpoint
DRAWN, STOPPING, WHY = "drawn", "stopping", "why"  # topics of `hosts.tell`
LOOKS_S = (0.01, 0.5)  # between looks at who has drawn: at first, at most
_rollouts = itertools.count(1)  # the same on every process: all take part in each


class Stop(Exception):  # noqa: N818 (no error: what was asked for)
    """The run ends here; what is under way is dropped.

    Args:
        code: exit code of the command.
    """

    def __init__(self, code: int = STOPPED_EARLY):
        super().__init__()
        self.code = code


class Stopping:
    """Answers whether to stop. A context manager: inside it a signal no longer ends the process.

    Args:
        grace_seconds: from the signal to the kill that will follow it.
        limit_seconds: from now on, beyond which no iteration should go; 0 = none.
    """

    def __init__(self, grace_seconds: float = 0.0, limit_seconds: float = 0.0):
        self.reason, self.code = "", STOPPED_EARLY  # why the run stops, "" while it does not; the exit code then
        self._grace, self._limit = grace_seconds, limit_seconds
        self._began = self._asked = time.monotonic()
        self._signalled: float | None = None  # when a signal came, on the clock
        self._interrupts = 0  # Ctrl-C
        self._question = 0
        self._chunks = 0  # asked about in this rollout
        self._finishing = False  # the rest of what is under way is known to fit
        self._iteration: float | None = None  # when the one under way began
        self._whole = True  # it began at its beginning
        self._evaluating: float | None = None  # when its evaluation began
        self._iteration_s: float | None = None  # that the one before took, without its evaluation
        self._evaluation_s: float | None = None  # that the newest evaluation took
        self._handlers = {}  # before ours

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT) if hosts.count() == 1 else (signal.SIGINT,)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def request(self, reason: str, code: int = STOPPED_EARLY) -> None:
        """Has the run stop, from any thread and any one of several processes.

        Args:
            code: the exit code then.
        """
        if self._signalled is None:
            self._signalled = time.monotonic()
            if hosts.count() == 1:
                self.reason, self.code = reason, code
            else:
                hosts.tell(WHY, f"{code} {reason}")
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of

    def _on_signal(self, number: int, _) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self._question and hosts.count() == 1:
            print(f"\n{name}: stopped before anything had begun", file=sys.stderr, flush=True)
            self.reason = name
            raise Stop(self.code)  # from wherever it was, as Ctrl-C does: a compilation is not waited for
        again = "; once more leaves at once" if number == signal.SIGINT else ""
        print(f"\n{name}: the run saves and stops{again}", file=sys.stderr, flush=True)
        self.request(name)

    def chunk(self) -> None:
        """Between two chunks of decoding. May raise Stop."""
        activity.beat()
        if hosts.count() == 1:
            self._ask()
        elif self._chunks < CHUNKS:
            self._chunks += 1
            self._ask(together=False)

    def drawn(self) -> None:
        """After a rollout, also an empty one. May raise Stop."""
        if hosts.count() == 1:
            return
        self._await_others()
        while self._chunks < CHUNKS:
            self.chunk()
        self._chunks = 0
        self._end_if_overdue()

    def _await_others(self) -> None:
        """Until all have drawn, or one has come to the question at which all stop, which is then before the others too."""
        number = next(_rollouts)
        if self.reason:
            return
        hosts.tell(DRAWN, str(number))
        pause_s, longest_s = LOOKS_S
        with activity.doing("waiting for the other processes to have drawn"):
            while not hosts.told(STOPPING):
                drawn = hosts.told(DRAWN)
                if len(drawn) == hosts.count() and all(int(done) >= number for done in drawn.values()):
                    return
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)

    def checking(self) -> None:
        """Now and then while answers are checked. May raise Stop, with one process: several would have to agree."""
        if hosts.count() == 1:
            self._ask()

    def update(self, limited: bool = False) -> None:
        """Before an optimizer step, or a microbatch of one. May raise Stop.

        Args:
            limited: whether the time limit may end the run here too.
        """
        activity.beat()
        self._ask()
        if limited and self._beyond_limit(0.0):
            raise Stop(self.code)

    def evaluation(self) -> None:
        """Before an evaluation; it can be dropped by itself, so whether it fits is another question."""
        activity.beat()
        self._evaluating, self._finishing = time.monotonic(), False

    def boundary(self, whole: bool = True, evaluates: bool = False) -> None:
        """Before an iteration, and after the last one. Raises Stop where no other should begin.

        Args:
            whole: False = a part of it was done before a restart, so that its time says nothing about the next one's.
            evaluates: whether it ends with an evaluation.
        """
        activity.beat()
        now = time.monotonic()
        done = now if self._evaluating is None else self._evaluating
        self._iteration_s = done - self._iteration if self._iteration is not None and self._whole else None
        self._evaluation_s = now - self._evaluating if self._evaluating is not None else self._evaluation_s
        first = self._iteration is None
        self._iteration, self._whole, self._evaluating = now, whole, None
        self._finishing = True  # nothing is under way
        self._ask(together=False)
        needed = (self._iteration_s or 0.0) + (self._evaluation_s or 0.0 if evaluates else 0.0)
        if not self.reason and self._beyond_limit(needed) and first:
            self.reason += ", which leaves no room for an iteration: raise it"
        if self.reason:
            raise Stop(self.code)
        self._finishing = False

    def _ask(self, together: bool = True) -> None:
        """May raise Stop.

        Args:
            together: whether all processes ask this at the same point of their work.
        """
        if hosts.count() > 1 and not self.reason:
            if multihost_utils.reached_preemption_sync_point(self._question):
                hosts.tell(STOPPING, str(self._question))
                code, _, self.reason = next(iter(hosts.told(WHY).values()), f"{STOPPED_EARLY} SIGTERM").partition(" ")
                self.code = int(code)
                self._signalled = self._asked  # or later: this is the safe side
            self._asked = time.monotonic()
        self._question += 1
        if self.reason and not self._finishing:  # several processes all have the same question before them
            if not hosts.from_first(self._fits):
                raise Stop(self.code)
            self._finishing = True
        elif together:
            self._end_if_overdue()

    def _end_if_overdue(self) -> None:
        """Raises Stop if what was to fit has taken longer."""
        if self.reason and self._finishing and hosts.from_first(lambda: time.monotonic() > self._latest()):
            raise Stop(self.code)

    def _latest(self) -> float:
        """When all but the checkpoint should be over; on the clock."""
        return self._signalled + FINISHING_SHARE * self._grace

    def _fits(self) -> bool:
        """Whether what is under way, an iteration or its evaluation, will end in time if it takes as long as the one before.

        Unknown, and so no, for the first one, and once it has taken longer.
        """
        began, seconds = self._iteration, self._iteration_s
        if self._evaluating is not None:
            began, seconds = self._evaluating, self._evaluation_s
        return began is not None and seconds is not None and time.monotonic() < began + seconds < self._latest()

    def _beyond_limit(self, seconds: float) -> bool:
        """Whether so many seconds more would go beyond the time limit; then that is the reason to stop."""
        if not self._limit:
            return False
        late = time.monotonic() + seconds > self._began + self._limit
        if not hosts.from_first(lambda: late):  # clocks differ
            return False
        self.reason = f"stop_after_minutes is {self._limit / 60:g}"
        return True
