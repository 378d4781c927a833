"""Worker processes that answer one request at a time, and are killed and replaced when they are late.

    with Workers("dgpo_jax.rewards.worker", count=2, deadline_s=2.0, memory_mb=2048, is_reply=STATUSES.__contains__) as workers:
        ticket = workers.submit(["1/2", "0.5"], read=lambda reply: reply)     # a Future

A worker is `python -m MODULE MEMORY_MB PARENT_PID`: one JSON line [number, request] in, one [number, reply] out, "ready" first
(see `serve`). By its number a line that comes late, or twice, is never taken for the reply to the next request.
Not multiprocessing: its workers would import the main module and JAX with it, or fork a process that has threads.
"""

import contextlib
import json
import os
import queue
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from dgpo_jax.processes import die_with

START_DEADLINE_S = 120.0  # for a worker to say "ready", libraries from a cold disk included; not counted against any request
READY, LATE, DIED = "ready", "timed_out", "crashed"  # the last two are replies that `submit` makes up
REPLY_CAP = 2**16  # bytes; a worker that goes on without a line end is replaced, before it fills the memory of the trainer
FAILED_STARTS = 3  # of a worker in a row, after which something is wrong with this machine and not with a request
_CLOSE_JOIN_S = 10.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Workers:
    """A context manager around `count` processes.

    Args:
        module: what each runs.
        count: processes, at least 1.
        deadline_s: seconds for one request.
        memory_mb: address space of each worker, in MiB. Linux only.
        is_reply: whether something a worker said, decoded, is a reply at all; one that says anything else is replaced.
    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, module: str, *, count: int, deadline_s: float, memory_mb: int, is_reply: Callable[[object], bool]):
        if count < 1:
            raise ValueError(f"workers: {count} is below 1; set 1 or more.")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s: {deadline_s} must be above 0 seconds; 2.0 suits mathematics.")
        if memory_mb < 256:
            raise ValueError(f"memory_mb: {memory_mb} is too little to start Python with its libraries; set 256 or more.")
        self._closed = False
        self._lock = threading.Lock()  # over `_closed`
        self._queue = queue.SimpleQueue()
        command = [sys.executable, "-m", module, str(memory_mb), str(os.getpid())]
        self._feeders = [_Feeder(self._queue, command, deadline_s, is_reply) for _ in range(count)]
        for feeder in self._feeders:
            feeder.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, request, read: Callable[[object], object]) -> Future:
        """Queues a request.

        Args:
            request: anything JSON can hold.
            read: makes the ticket's result of the reply, of LATE where none came in time, or of DIED where the worker
                died of it twice, or of starting.
        Returns:
            A Future that cannot be cancelled, since several callers may share it.
        Raises:
            RuntimeError: after close().
        """
        ticket = Future()
        ticket.set_running_or_notify_cancel()
        with self._lock:  # so that nothing is queued after close() has emptied the queue, to wait for ever
            self.require_open()
            self._queue.put((ticket, json.dumps(request).encode(), read))
        return ticket

    def require_open(self) -> None:
        """Raises RuntimeError after close()."""
        if self._closed:
            raise RuntimeError("workers: submit() after close(); make new ones.")

    def pids(self) -> list[int]:
        """Process ids of the workers that run now, for monitoring."""
        processes = [feeder.process for feeder in self._feeders]
        return [process.pid for process in processes if process is not None]

    def wait_started(self, seconds: float) -> bool:
        """Waits until every worker is ready or has failed to start; False if that took longer."""
        end = time.monotonic() + seconds
        return all(feeder.started.wait(max(0.0, end - time.monotonic())) for feeder in self._feeders)

    def close(self) -> None:
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
                    item[0].set_exception(_closed_error())


def _closed_error():
    return RuntimeError("workers: closed before this answer was checked.")


def _why_not_ready(error):
    if isinstance(error, OSError):
        return f"could not be started ({error.strerror})"
    return f"was not ready after {START_DEADLINE_S:.0f} s" if isinstance(error, _LateError) else "ended, or printed something else, before it was ready"


class _WorkerDiedError(Exception):
    """The worker process ended, or spoke out of turn, while it owed a line."""


class _LateError(Exception):
    """The worker process owed a line past its deadline."""


class _Feeder(threading.Thread):
    """Feeds one worker process, one request at a time, and replaces it when it is late or dead.

    The process is started from this thread, because Linux ties "die with the parent" to the parent's thread.
    """

    def __init__(self, work, command, deadline_s, is_reply):
        super().__init__(name="worker-feeder", daemon=True)
        self.work = work
        self.command = command
        self.deadline_s = deadline_s
        self.is_reply = is_reply
        self.process = None
        self.failed_starts = 0  # since a process was ready
        self.asked = 0  # requests so far, also the number of the newest
        self.stopping = False
        self.started = threading.Event()  # set once the first process is ready, or failed to start
        self.lock = threading.Lock()  # over `process` and `stopping`

    def run(self):
        try:
            with contextlib.suppress(RuntimeError, _WorkerDiedError):  # met, and reported, again with the first request
                self._ensure_process()
            self.started.set()
            while (item := self.work.get()) is not None:
                ticket, request, read = item
                try:
                    ticket.set_result(read(self._ask(request)))
                except Exception as error:  # whoever waits for the ticket must hear of it, or would wait for ever
                    ticket.set_exception(error)
        finally:
            self._discard()

    def stop(self):
        """Called from another thread: kills the process, which wakes this thread if it waits for a reply."""
        with self.lock:
            self.stopping = True
            if self.process is not None:
                self.process.kill()

    def _ask(self, request):
        """A reply, LATE or DIED. A worker that dies gets one successor: its death may have had nothing to do with the request.

        One that dies while it starts counts as dead too: what the machine kills now and then does not end a run.

        Raises:
            RuntimeError: FAILED_STARTS workers in a row did not start, or the workers are closed.
        """
        for _ in range(2):
            try:
                self._ensure_process()
                end = time.monotonic() + self.deadline_s
                self.asked += 1
                self._write(b"[%d, %b]\n" % (self.asked, request), end)
                _, reply = self._read_line(end, self._is_due)
                return reply
            except _LateError:
                self._discard()
                return LATE
            except (_WorkerDiedError, BrokenPipeError):
                self._discard()
        if self.stopping:  # which killed it
            raise _closed_error()
        return DIED

    def _is_due(self, said):
        return isinstance(said, list) and len(said) == 2 and said[0] == self.asked and self.is_reply(said[1])

    def _ensure_process(self):
        """Starts a process if there is none. Raises _WorkerDiedError if it does not start, RuntimeError as `_ask` does."""
        if self.process is not None:
            return
        try:
            self._start()
            self._read_line(time.monotonic() + START_DEADLINE_S, READY.__eq__)
        except (_LateError, _WorkerDiedError, OSError) as error:
            self._discard()
            self.failed_starts += 1
            if self.failed_starts >= FAILED_STARTS:
                raise RuntimeError(f"a worker {_why_not_ready(error)}; to see why, run {' '.join(self.command)}") from error
            raise _WorkerDiedError from error
        self.failed_starts = 0

    def _start(self):
        paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Without gmpy2, Python's own big integers are slower but the same everywhere, and can be interrupted.
        fixed = {"PYTHONHASHSEED": "0", "MPMATH_NOGMPY": "1", "SYMPY_GROUND_TYPES": "python"}
        environment = {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}
        with self.lock:
            if self.stopping:
                raise _closed_error()
            # In a group of its own Ctrl-C does not reach it, not even before `restrict` has it ignored.
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0, process_group=0
            )

    def _write(self, request, end):
        """Sends a request, which may be more than a pipe holds. Raises _LateError, or BrokenPipeError if the worker is dead."""
        os.set_blocking(self.process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdin, selectors.EVENT_WRITE)
            while request:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise _LateError
                request = request[os.write(self.process.stdin.fileno(), request) :]

    def _read_line(self, end, expected):
        """The next reply, decoded, if it is there by `end` on the monotonic clock. Raises _LateError or _WorkerDiedError."""
        received = b""
        with selectors.DefaultSelector() as selector:  # select.select refuses descriptors above 1023
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise _LateError
                chunk = os.read(self.process.stdout.fileno(), 4096)
                received += chunk
                if not chunk or len(received) > REPLY_CAP:
                    raise _WorkerDiedError
        try:
            reply = json.loads(received)
        except (ValueError, RecursionError):
            raise _WorkerDiedError from None
        if not expected(reply):  # something else was printed: what it says next cannot be trusted
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


def serve(answer: Callable[..., object], memory_mb: int, parent: int, warm_up: Callable[[], object]) -> None:
    """In the worker: replies to every request, a number and a list of arguments, with answer(*arguments), until the input closes.

    An exception is a fault of the checker, not of the request: it is shown, the reply is DIED, and the worker goes on.

    Args:
        warm_up: imports libraries and fills their tables before the first deadline starts to count.
    """
    restrict(memory_mb, parent)
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    warm_up()
    _reply(replies, READY)
    for line in sys.stdin:
        number, arguments = json.loads(line)
        _reply(replies, [number, attempt(answer, arguments)])


def attempt(answer: Callable[..., object], arguments: list) -> object:
    """answer(*arguments), or DIED where that raises."""
    try:
        return answer(*arguments)
    except MemoryError:
        return DIED
    except Exception as error:
        print(f"checker: {type(error).__name__}: {error} on {str(arguments)[:500]}", file=sys.stderr)
        return DIED


def restrict(memory_mb: int, parent: int) -> None:
    """No core dumps, no Ctrl-C of the trainer's terminal; on Linux a memory limit, and death together with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS refuses limits on the address space
        _, ceiling = resource.getrlimit(resource.RLIMIT_AS)  # of the shell or the batch system, which nobody may raise
        memory = memory_mb * 2**20 if ceiling == resource.RLIM_INFINITY else min(memory_mb * 2**20, ceiling)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    die_with(parent)


def _reply(file, reply):
    file.write(json.dumps(reply) + "\n")
    file.flush()
