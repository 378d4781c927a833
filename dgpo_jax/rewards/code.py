"""Grades programs: finds the one in a response, has it run against test cases in a sandbox, and compares outputs here.

    with CodePool(workers=2, sandbox="bubblewrap") as pool:
        verdicts = pool.score([(problem.tests, "... ```python\\nprint(int(input()) + 1)\\n```"), ...])      # in order

`code_tests` reads test cases and compares outputs with what was expected, `sandbox` starts the process in which
`code_runner` runs the program. Expected outputs stay in this process; docs/code_rewards.md says why.
"""

import collections
import contextlib
import queue
import sys
import threading
from concurrent.futures import Future

from dgpo_jax.rewards import sandbox as boxes
from dgpo_jax.rewards.code_runner import OUTPUT, UNPARSABLE
from dgpo_jax.rewards.code_tests import is_right, parse_tests
from dgpo_jax.rewards.extract import TEXT_CAP, after_thinking
from dgpo_jax.rewards.sandbox import DiedError, LateError, Limits, Run, TooManyThreadsError
from dgpo_jax.types import Verdict

LANGUAGES = ("python", "python3", "py")
EXTRACTED_CAP = 8192  # characters of a program that its verdict shows
CACHE_SIZE = 4096  # (tests, program) pairs
WALL_PER_CPU = 3  # as much slower as a machine with more work than cores may be before the clock decides
TRIES = 2  # of a sandbox that dies: its death may have had nothing to do with the program
_CLOSE_JOIN_S = 10.0
_CLOSED = "CodePool: closed before this program was tested."


def find_program(response):
    """The last fenced block marked as Python, else the last one with no mark, else None.

    Only text after the last </think> counts, only blocks that were closed, and only the last extract.TEXT_CAP characters. A
    block in an item of a list is indented as its fence is, and one that was never closed ends where the next begins.
    """
    text = after_thinking(response)
    if text is None:
        return None
    found = {}  # True = marked as Python
    language, indent, block = None, 0, []  # of the block that is open
    for line in text[-TEXT_CAP:].split("\n"):
        mark = line.strip()
        if mark == "```" and language is not None:
            if language in (*LANGUAGES, "") and any(map(str.strip, block)):
                found[language in LANGUAGES] = "".join(f"{kept}\n" for kept in block)
            language = None
        elif mark.startswith("```"):
            words = mark[3:].lower().split()
            language, indent, block = words[0] if words else "", len(line) - len(line.lstrip()), []
        elif language is not None:
            block.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    return found.get(True, found.get(False))


class CodePool:
    """A context manager around `workers` threads, each with one sandbox process at a time.

    Args:
        workers: programs tested at once; more than there are cores gains nothing.
        sandbox: one of sandbox.KINDS; tried once, here.
        test_s: CPU seconds of one test case; a `time_limit` among the tests replaces it.
        wall_s: seconds on the clock for a response, met only by what waits without computing: all its test cases together
            have wall_s / WALL_PER_CPU CPU seconds.
        memory_mb: address space of a test case, in MiB.
        max_tests: test cases tried, the first of each problem; 0 = all.
    Raises:
        ValueError: a setting out of range, or a sandbox that does not work on this machine.
    """

    def __init__(self, workers=2, sandbox="bubblewrap", test_s=4.0, wall_s=60.0, memory_mb=512, max_tests=0):
        if workers < 1:
            raise ValueError(f"workers: {workers} is below 1; set 1 or more.")
        if not test_s > 0:
            raise ValueError(f"test_s: {test_s} CPU seconds is not above 0; 4 suits most problems.")
        if wall_s < WALL_PER_CPU * test_s:
            raise ValueError(
                f"wall_s: {wall_s} would strike programs that only compute; set {WALL_PER_CPU} times test_s, {WALL_PER_CPU * test_s}, or more."
            )
        if memory_mb < 64:
            raise ValueError(f"memory_mb: {memory_mb} is too little to start Python; set 64 or more, 256 with numpy.")
        if max_tests < 0:
            raise ValueError(f"max_tests: {max_tests} is negative; set 0 for all test cases.")
        self._max_tests = max_tests
        self._limits = Limits(test_s, wall_s / WALL_PER_CPU, memory_mb, wall_s)
        boxes.probe(sandbox, self._limits)
        self._lock = threading.Lock()  # over `_closed` and `_cache`
        self._closed = False
        self._cache = collections.OrderedDict()  # (tests, program) -> its ticket, pending ones included
        self._queue = queue.SimpleQueue()
        self._testers = [_Tester(self._queue, sandbox, self._limits) for _ in range(workers)]
        for tester in self._testers:
            tester.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, tests, response):
        """Starts testing the program of one response; returns a ticket, a Future whose result() is the Verdict.

        Raises:
            ValueError: malformed tests. RuntimeError: the pool is closed.
        """
        parsed, program = parse_tests(tests), find_program(response)
        if self._max_tests:
            parsed = parsed._replace(inputs=parsed.inputs[: self._max_tests], outputs=parsed.outputs[: self._max_tests])
        with self._lock:  # so that nothing is queued after close() has emptied the queue, to wait for ever
            if self._closed:
                raise RuntimeError("CodePool: submit() after close(); make a new pool.")
            if program is not None:
                return self._cached_ticket(tests, parsed, program)
        ticket = Future()
        ticket.set_result(Verdict("no_answer", None, 0.0))
        return ticket

    def _cached_ticket(self, tests, parsed, program):
        """The ticket of an equal pair if it is pending or was judged; one that timed out or crashed is tried again."""
        key = (tests, program)
        ticket = self._cache.get(key)
        if ticket is None or _has_failed(ticket):
            ticket = self._cache[key] = Future()
            ticket.set_running_or_notify_cancel()  # several callers may share it, so none may cancel it
            self._queue.put((ticket, parsed, program))
        self._cache.move_to_end(key)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return ticket

    def gather(self, tickets):
        """Waits for tickets; returns their Verdicts in the same order."""
        return [ticket.result() for ticket in tickets]

    def score(self, pairs):
        """Tests the programs of (tests, response) pairs; returns their Verdicts in order."""
        return self.gather([self.submit(tests, response) for tests, response in pairs])

    def close(self):
        """Kills what runs and waits for it. Tickets still pending raise RuntimeError. May be called twice."""
        with self._lock:
            self._closed = True
        for tester in self._testers:
            tester.stop()
        for _ in self._testers:
            self._queue.put(None)
        for tester in self._testers:
            tester.join(_CLOSE_JOIN_S)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[0].set_exception(RuntimeError(_CLOSED))


def _has_failed(ticket):
    """True for a ticket whose program was not judged, which may have had nothing to do with the program."""
    return ticket.done() and (ticket.exception() is not None or ticket.result().status in ("timed_out", "crashed"))


class _Tester(threading.Thread):
    """Tests one program after the other. Sandboxes are started here, because they die with the thread that started them."""

    def __init__(self, work, kind, limits):
        super().__init__(name="code-tester", daemon=True)
        self.work, self.kind, self.limits = work, kind, limits
        self.run_now = None  # the sandbox at work
        self.stopping = False
        self.lock = threading.Lock()  # over the two above

    def run(self):
        while (item := self.work.get()) is not None:
            ticket, tests, program = item
            try:
                ticket.set_result(self._judge(tests, program))
            except Exception as error:  # whoever waits for the ticket must hear of it, or would wait for ever
                ticket.set_exception(error)

    def stop(self):
        """Called from another thread: kills the sandbox, which wakes this thread."""
        with self.lock:
            self.stopping = True
            if self.run_now is not None:
                self.run_now.kill()

    def _judge(self, tests, program):
        shown = program[:EXTRACTED_CAP]
        if self.stopping:
            raise RuntimeError(_CLOSED)
        for attempt in range(TRIES):
            try:
                status, share = self._test(tests, program)
                return Verdict(status, shown, share)
            except LateError:
                return Verdict("timed_out", shown, 0.0)
            except (OSError, DiedError) as error:
                if self.stopping:
                    raise RuntimeError(_CLOSED) from error
                print(f"code sandbox, try {attempt + 1} of {TRIES}: {type(error).__name__}: {error}", file=sys.stderr)
        return Verdict("crashed", shown, 0.0)

    def _test(self, tests, program):
        """(status, share of the test cases passed) of one program. Raises what Run and its frames do."""
        test_s = self.limits.test_s if tests.time_limit is None else min(tests.time_limit, self.limits.total_s)
        limits = self.limits._replace(test_s=test_s)
        job = {"program": program, "inputs": tests.inputs, "fn_name": tests.fn_name}
        passed = 0
        with Run(self.kind, job, limits) as run:
            with self.lock:
                self.run_now = run
                if self.stopping:
                    run.kill()
            try:
                for number, (happened, _, output) in enumerate(run.frames()):
                    if happened == UNPARSABLE:
                        return "unparsable", 0.0
                    passed += happened == OUTPUT and is_right(tests, number, output)
            except TooManyThreadsError:  # the program's doing: what it had not done by then is failed
                return "wrong", passed / len(tests.inputs)
            finally:
                with self.lock:
                    self.run_now = None
        return "correct" if passed == len(tests.inputs) else "wrong", passed / len(tests.inputs)
