"""Checks many answers at once in worker processes that can be killed, while the trainer goes on sampling.

    with VerifierPool(workers=2, deadline_s=2.0) as pool:
        verdicts = pool.score([("1/2", "... \\boxed{0.5}"), ...])          # in order
        tickets = [pool.submit(answer, response) for ...]                 # or streaming
        verdicts = pool.gather(tickets)

Each worker process has one thread here that feeds it. Answers that strings or exact numbers settle never leave this process.
"""

import collections
import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from dgpo_jax.rewards.extract import BOX_CAP, RULES, find_answer
from dgpo_jax.rewards.math import quick_status
from dgpo_jax.types import STATUSES, Verdict

START_DEADLINE_S = 120.0  # for a worker to say "ready", SymPy from a cold disk included; not counted against any answer
CACHE_SIZE = 16_384  # (answer, extracted) pairs that went to a worker, at about 2 kB
_CLOSE_JOIN_S = 10.0
_REPLIES = {json.dumps(reply).encode() + b"\n": reply for reply in ("ready", *STATUSES)}
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class VerifierPool:
    """A context manager around `workers` checker processes.

    Args:
        workers: processes, at least 1.
        deadline_s: seconds for one answer; a later one is "timed_out", its worker killed and replaced.
        extract: where the answer stands, one of extract.RULES.
        memory_mb: address space of each worker, in MiB; an answer that needs more is "crashed". Linux only.
    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, workers=2, deadline_s=2.0, extract="boxed", memory_mb=2048):
        if workers < 1:
            raise ValueError(f"workers: {workers} is below 1; set 1 or more.")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s: {deadline_s} must be above 0 seconds; 2.0 suits mathematics.")
        if extract not in RULES:
            raise ValueError(f"extract: {extract!r} is not a rule; use one of {', '.join(RULES)}.")
        if memory_mb < 256:
            raise ValueError(f"memory_mb: {memory_mb} is too little to start Python with its libraries; set 256 or more.")
        self.extract = extract
        self._closed = False
        self._lock = threading.Lock()  # over `_closed` and `_cache`
        self._cache = collections.OrderedDict()  # (answer, extracted) -> its ticket, pending ones included
        self._queue = queue.SimpleQueue()
        self._feeders = [_Feeder(self._queue, deadline_s, memory_mb) for _ in range(workers)]
        for feeder in self._feeders:
            feeder.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, answer, response):
        """Starts checking one response; returns a ticket, a Future whose result() is the Verdict."""
        extracted = find_answer(response, self.extract)
        status = "no_answer" if extracted is None else quick_status(answer, extracted)
        with self._lock:  # so that nothing is queued after close() has emptied the queue, to wait for ever
            if self._closed:
                raise RuntimeError("VerifierPool: submit() after close(); make a new pool.")
            if status is None:
                return self._cached_ticket(answer, extracted)
        ticket = Future()
        ticket.set_result(Verdict(status, extracted and extracted[:BOX_CAP]))
        return ticket

    def _cached_ticket(self, answer, extracted):
        """The ticket of an equal pair if it is pending or was judged; one that timed out or crashed is tried again."""
        key = (answer, extracted)
        ticket = self._cache.get(key)
        if ticket is None or _has_failed(ticket):
            ticket = self._cache[key] = Future()
            ticket.set_running_or_notify_cancel()  # several callers may share it, so none may cancel it
            self._queue.put((ticket, answer, extracted))
        self._cache.move_to_end(key)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return ticket

    def gather(self, tickets):
        """Waits for tickets; returns their Verdicts in the same order."""
        return [ticket.result() for ticket in tickets]

    def score(self, pairs):
        """Checks (answer, response) pairs; returns their Verdicts in order."""
        return self.gather([self.submit(answer, response) for answer, response in pairs])

    def check_golds(self, problems):
        """Returns the problems whose reference answer is not found equal to itself: no response could ever be right."""
        problems = list(problems)
        verdicts = self.score([(problem.answer, f"\\boxed{{{problem.answer}}}") for problem in problems])
        return [problem for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.correct]

    def worker_pids(self):
        """Process ids of the workers that run now, for monitoring."""
        processes = [feeder.process for feeder in self._feeders]
        return [process.pid for process in processes if process is not None]

    def close(self):
        """Kills the workers and waits for them. Tickets still pending raise RuntimeError. May be called twice."""
        with self._lock:
            self._closed = True
        for feeder in self._feeders:
            feeder.stop()
        for _ in self._feeders:
            self._queue.put(None)
        for feeder in self._feeders:
            feeder.join(_CLOSE_JOIN_S)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[0].set_exception(RuntimeError("VerifierPool: closed before this answer was checked."))


def _has_failed(ticket):
    """True for a ticket whose answer was not judged, which may have had nothing to do with the answer."""
    return ticket.done() and (ticket.exception() is not None or ticket.result().status in ("timed_out", "crashed"))


class _WorkerDiedError(Exception):
    """The worker process ended, or spoke out of turn, while it owed a line."""


class _LateError(Exception):
    """The worker process owed a line past its deadline."""


class _Feeder(threading.Thread):
    """Feeds one worker process, one answer at a time, and replaces it when it is late or dead.

    The process is started from this thread, because Linux ties "die with the parent" to the parent's thread.
    """

    def __init__(self, work, deadline_s, memory_mb):
        super().__init__(name="verifier-feeder", daemon=True)
        self.work = work
        self.deadline_s = deadline_s
        self.memory_mb = memory_mb
        self.process = None
        self.stopping = False
        self.ready = threading.Event()  # set once the first process has started, or failed to
        self.lock = threading.Lock()  # over `process` and `stopping`

    def run(self):
        try:
            self._start_ahead()
            while (item := self.work.get()) is not None:
                ticket, answer, extracted = item
                try:
                    ticket.set_result(Verdict(self._check(answer, extracted), extracted[:BOX_CAP]))
                except Exception as error:  # whoever waits for the ticket must hear of it, or would wait for ever
                    ticket.set_exception(error)
        finally:
            self._discard()

    def stop(self):
        """Called from another thread: kills the process, which wakes this thread if it waits for an answer."""
        with self.lock:
            self.stopping = True
            if self.process is not None:
                self.process.kill()

    def _start_ahead(self):
        """Starts the process before the first answer comes; a failure is met, and reported, again with that answer."""
        with contextlib.suppress(RuntimeError, OSError):
            self._ensure_process()
        self.ready.set()

    def _check(self, answer, extracted):
        """A status. A worker that dies gets one successor: its death may have had nothing to do with the answer."""
        request = json.dumps([answer, extracted]) + "\n"
        for _ in range(2):
            self._ensure_process()
            try:
                os.write(self.process.stdin.fileno(), request.encode())
                return self._read_line(self.deadline_s)
            except _LateError:
                self._discard()
                return "timed_out"
            except (_WorkerDiedError, BrokenPipeError):
                self._discard()
        return "crashed"

    def _ensure_process(self):
        if self.process is not None:
            return
        paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Without gmpy2, Python's own big integers are slower but the same everywhere, and can be interrupted.
        fixed = {"PYTHONHASHSEED": "0", "MPMATH_NOGMPY": "1", "SYMPY_GROUND_TYPES": "python"}
        environment = {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "dgpo_jax.rewards.worker", str(self.memory_mb), str(os.getpid())]
        with self.lock:
            if self.stopping:
                raise RuntimeError("VerifierPool: closed before this answer was checked.")
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
        try:
            self._read_line(START_DEADLINE_S)
        except (_LateError, _WorkerDiedError) as error:
            self._discard()
            how = f"was not ready after {START_DEADLINE_S:.0f} s" if isinstance(error, _LateError) else "ended, or printed something else, before it was ready"
            raise RuntimeError(f"VerifierPool: a worker {how}; to see why, run {command}") from error

    def _read_line(self, seconds):
        """The next reply, decoded. Raises _LateError or _WorkerDiedError."""
        end = time.monotonic() + seconds
        received = b""
        with selectors.DefaultSelector() as selector:  # select.select refuses descriptors above 1023
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise _LateError
                chunk = os.read(self.process.stdout.fileno(), 4096)
                if not chunk:
                    raise _WorkerDiedError
                received += chunk
        reply = _REPLIES.get(received)
        if reply is None:  # something else was printed: what it says next cannot be trusted
            raise _WorkerDiedError
        return reply

    def _discard(self):
        """Kills the process if it still runs, reaps it and closes its pipes."""
        with self.lock:
            process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
