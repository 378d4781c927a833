"""Starts one process that cannot reach the network, the user's files or other processes, and reads what it reports.

Two kinds. `bubblewrap` has namespaces of its own: no network, no home, nothing writable, read-only views of the system's
libraries and of this Python. `rlimits` is for machines where namespaces are forbidden: the limits and the system-call
filter are the same, but the program sees, and may write, whatever files the user may.

What runs inside is `code_runner`; docs/code_rewards.md says what this stops and what it does not.
"""

import contextlib
import marshal
import os
import selectors
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.rewards.code_runner import FAILED, FRAME, OUTPUT
from dgpo_jax.rewards.syscall_filter import filter_bytes

KINDS = ("bubblewrap", "rlimits")
OUTPUT_CAP = 4 * 2**20  # bytes that one test case may write
THREADS_CAP = 64  # of one response; RLIMIT_AS alone would let a program have thousands of small ones
WATCH_S = 0.1  # at least, between two counts of threads, which cost some system calls each
PROBE_S = 60.0
_REAP_S = 10.0
_RUNNER = Path(__file__).with_name("code_runner.py")
_PACKAGE = Path(__file__).resolve().parents[1]
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
# PYTHONHASHSEED: the order of a set is the same in each run. One thread per library: a test case is one core's work.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


class Limits(NamedTuple):
    """Of one response."""

    test_s: float = 4.0  # CPU seconds of one test case; more fails it
    total_s: float = 20.0  # CPU seconds of all test cases; those that come after fail
    memory_mb: int = 512  # address space of a test case, MiB; one runs at a time
    wall_s: float = 60.0  # seconds on the clock for the whole response; only what waits without computing meets it


class LateError(Exception):
    """The wall-clock backstop struck."""


class TooManyThreadsError(Exception):
    """More than THREADS_CAP threads ran at once."""


class DiedError(Exception):
    """The sandbox ended, or spoke out of turn, while it owed a frame; says why, where it said anything."""


class Run:
    """One sandbox process at work on one job. `frames` reads its report; `kill` ends it, from any thread.

    Args:
        kind: one of KINDS.
        job: program, inputs and fn_name, as `code_runner` wants them.
        limits: Limits.
    Raises:
        OSError: the process could not be started.
    """

    def __init__(self, kind, job, limits):
        self._end = time.monotonic() + limits.wall_s
        self._next_count = 0.0  # of threads, on the same clock
        self._inputs = len(job["inputs"])
        boxed = kind == "bubblewrap"
        self._folder = None if boxed else tempfile.mkdtemp(prefix="dgpo_jax_code_")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        job = {
            **job, "test_s": limits.test_s, "total_s": limits.total_s, "memory_mb": limits.memory_mb,
            "output_kb": OUTPUT_CAP // 1024,
            # A user namespace counts its own processes; outside one, this would count all that the user runs.
            "threads": THREADS_CAP if boxed else None, "parent": None if boxed else os.getpid(),
            "paths": site.getsitepackages(), "filter": filter_bytes(),
        }  # fmt: skip
        try:
            with tempfile.TemporaryFile() as file:  # not a pipe, which would block once it is full and nobody reads
                file.write(marshal.dumps(job))
                file.seek(0)
                self.process = subprocess.Popen(
                    make_command(kind), stdin=file, stdout=subprocess.PIPE, stderr=self._errors, env=_ENVIRONMENT,
                    cwd=self._folder or "/", start_new_session=True, bufsize=0,
                )  # fmt: skip
        except BaseException:
            self._clean_up()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_S)
        self.process.stdout.close()
        self._clean_up()

    def _clean_up(self):
        self._errors.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self):
        """Kills the session: bubblewrap takes its namespace along, and the filter lets no program leave the session."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def frames(self):
        """Yields (what happened, CPU seconds, output) per test case as they end; one alone if it is UNPARSABLE.

        Raises:
            LateError, TooManyThreadsError, DiedError: see there.
        """
        for _ in range(self._inputs):
            happened, cpu_s, length = FRAME.unpack(self._read(FRAME.size))
            if length > OUTPUT_CAP:
                raise DiedError(f"a report of {length} bytes")
            yield happened, cpu_s, self._read(length)
            if happened not in (FAILED, OUTPUT):
                return

    def _read(self, length):
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while len(received) < length:
                ready = selector.select(WATCH_S)
                self._watch()  # also where there is something to read: a program can see to it that there always is
                if not ready:
                    continue
                chunk = os.read(self.process.stdout.fileno(), min(length - len(received), 1 << 20))
                if not chunk:
                    raise DiedError(self._last_words())
                received += chunk
        return bytes(received)

    def _watch(self):
        now = time.monotonic()
        if now > self._end:
            raise LateError
        if now >= self._next_count:
            self._next_count = now + WATCH_S
            if count_threads(self.process.pid) > THREADS_CAP:  # the kernel's own limit spares root
                raise TooManyThreadsError

    def _last_words(self):
        self._errors.seek(0)
        lines = self._errors.read(65_536).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"


def make_command(kind):
    """The command line that starts the runner in a sandbox of this kind."""
    python = [sys.executable, "-S", "-s", "-P", "-X", "utf8", "-W", "ignore", "-c", _RUNNER.read_text(encoding="utf-8")]
    if kind == "rlimits":
        return python
    prefixes = dict.fromkeys(os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.exec_prefix))
    bound = dict.fromkeys([*_SYSTEM, sys.base_prefix, sys.prefix, *prefixes])
    options = [option for path in bound for option in ("--ro-bind-try", path, path)]
    options += [option for path in _DEVICES for option in ("--dev-bind", path, path)]
    if any(_PACKAGE.is_relative_to(path) for path in bound):  # installed: it holds solutions of the built-in problems
        options += ["--tmpfs", str(_PACKAGE), "--remount-ro", str(_PACKAGE)]
    # The root is a tmpfs of bubblewrap's own. With it read-only nothing is writable, so no file can eat memory.
    options += ["--dir", "/box", "--remount-ro", "/", "--chdir", "/box"]
    identity = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    # As process 1 of its namespace the runner cannot be killed from inside, and all others end with it.
    return [shutil.which("bwrap") or "bwrap", *identity, "--die-with-parent", "--as-pid-1", *options, "--", *python]


def count_threads(pid):
    """Threads of a process and of its descendants; 0 for those that are gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(fields[17]) + sum(count_threads(child) for child in children)


_PROBE = """
import os, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
print(refused(os.fork), refused(socket.socket), refused(lambda: os.kill(os.getppid(), 0)), refused(lambda: open({file!r})))
"""


def probe(kind, limits=None):
    """Tries a sandbox once, with a program that attempts what it must not be able to do.

    Raises:
        ValueError: this kind does not work, or does not hold, on this machine; says what to do.
    """
    if kind not in KINDS:
        raise ValueError(f"code.sandbox is {kind!r}, which is no kind of sandbox; choose one of {', '.join(KINDS)}.")
    if sys.platform != "linux":
        raise ValueError(f"code.sandbox: programs are tested on Linux only, and this is {sys.platform}; leave code problems out.")
    opt_in = "or set code.sandbox=rlimits, in which a program under test can read, write and delete whatever files you can"
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        raise ValueError(
            "code.sandbox=bubblewrap needs the program bwrap, which is not on the PATH;"
            f" install it (Debian: apt install bubblewrap), {opt_in}."
        )
    job = {"program": _PROBE.format(file=__file__), "inputs": [""], "fn_name": None}
    hint = f"allow unprivileged user namespaces, {opt_in}" if kind == "bubblewrap" else "run on a kernel that has seccomp filters"
    try:
        with Run(kind, job, (limits or Limits())._replace(wall_s=PROBE_S)) as run:
            ((happened, _, output),) = run.frames()
    except (OSError, LateError, DiedError, TooManyThreadsError) as error:
        raise ValueError(f"code.sandbox={kind} does not start here ({error or 'no answer'}); {hint}.") from error
    expected = b"True True True True\n" if kind == "bubblewrap" else b"True True True False\n"
    if happened != OUTPUT or output != expected:
        raise ValueError(f"code.sandbox={kind} does not hold here (refused fork, socket, signal, file: {output!r}); {hint}.")
