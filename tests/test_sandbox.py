"""What a tested program can reach, in each kind of sandbox; what it leaves behind; and when a sandbox is refused."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dgpo_jax.rewards import sandbox
from dgpo_jax.rewards.code_runner import FAILED, OUTPUT, UNPARSABLE
from dgpo_jax.rewards.sandbox import (
    DiedError,
    LateError,
    Limits,
    Run,
    TooManyThreadsError,
    count_threads,
    make_command,
    probe,
)
from dgpo_jax.rewards.syscall_filter import filter_bytes

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(test_s=1.0, total_s=4.0, memory_mb=256, wall_s=60.0)


def bubblewrap_works():
    try:
        probe("bubblewrap")
    except ValueError:
        return False
    return True


KINDS = [
    pytest.param("bubblewrap", marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap does not work here")),
    "rlimits",
]
needs_bubblewrap = KINDS[0].marks[0]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def run(kind, program, inputs=("",), fn_name=None, **limits):
    """[(what happened, output)] of a program, per input."""
    job = {"program": program, "inputs": list(inputs), "fn_name": fn_name}
    with Run(kind, job, LIMITS._replace(**limits)) as started:
        return [(happened, output) for happened, _, output in started.frames()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_input_gets_its_own_output_in_order(kind):
    assert run(kind, "print(int(input()) * 2)", ["1\n", "21\n"]) == [(OUTPUT, b"2\n"), (OUTPUT, b"42\n")]


def test_a_function_is_called_with_its_arguments_and_its_value_comes_back_as_json(kind):
    program = "print('noise')\ndef f(a, b):\n    print('more noise')\n    return (a, {'b': b})"
    assert run(kind, program, [[1, "x"], [None, [2.5]]], "f") == [(OUTPUT, b'[1, {"b": "x"}]'), (OUTPUT, b'[null, {"b": [2.5]}]')]


# What a program tries, and what the attempt raises. All calls that would make a second process, or reach one.
ATTEMPTS = [
    ("import os; os.fork()", "PermissionError"),
    ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
    ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
    ("import multiprocessing as m; m.Process(target=print).start()", "PermissionError"),
    ("import os; os.setsid()", "PermissionError"),
    ("import socket; socket.socket()", "PermissionError"),
    ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
    ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    ("import os; os.pidfd_open(os.getppid())", "PermissionError"),
    ("import os; os.memfd_create('x')", "PermissionError"),
    ("import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "PermissionError"),
    ("import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    ("import socket, fcntl; a, b = socket.socketpair(); fcntl.ioctl(a, 0x8901, b'\\1\\0\\0\\0')", "PermissionError"),  # FIOSETOWN
    ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))", "ValueError"),  # by root too
    ("import os; os.setgroups([])", "PermissionError"),
]


@pytest.mark.parametrize("attempt, raised", ATTEMPTS)
def test_calls_that_reach_beyond_the_process_are_refused(kind, attempt, raised):
    program = f"try:\n    {attempt}\n    print('nothing')\nexcept Exception as error:\n    print(type(error).__name__)"
    assert run(kind, program) == [(OUTPUT, raised.encode() + b"\n")]


@pytest.mark.parametrize("number", [57 | 0x40000000, 41 | 0x40000000])  # fork and socket, under their x32 numbers
def test_the_second_set_of_numbers_of_x86_is_refused_too(number):
    if os.uname().machine != "x86_64":
        pytest.skip("other machines have one set")
    program = f"import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nprint(l.syscall({number}, 2, 1, 0), ctypes.get_errno())"
    assert run("rlimits", program) == [(OUTPUT, b"-1 1\n")]  # EPERM; without the filter the kernel has no such call (38) or makes it


def test_the_filter_is_for_machines_whose_numbers_are_known():
    assert filter_bytes("x86_64") != filter_bytes("aarch64")
    with pytest.raises(ValueError, match=r"machine 'riscv64'.*x86_64 or aarch64"):
        filter_bytes("riscv64")


# Just within a limit, and just beyond it.
@pytest.mark.parametrize("program, happened", [
    (f"print('x' * {sandbox.OUTPUT_CAP - 1})", OUTPUT),
    (f"print('x' * {sandbox.OUTPUT_CAP})", FAILED),
    (f"import os\nos.ftruncate(1, {sandbox.OUTPUT_CAP + 1})", FAILED),
    ("bytearray(150 * 2**20)", OUTPUT),  # of 256 MiB, some taken by Python and its stack
    ("bytearray(256 * 2**20)", FAILED),
    ("x = [open('/dev/null') for _ in range(50)]", OUTPUT),
    ("x = [open('/dev/null') for _ in range(64)]", FAILED),
    ("import time\nwhile time.process_time() < 0.7: pass", OUTPUT),
    ("import time\nwhile time.process_time() < 1.3: pass", FAILED),  # and not at the next whole second
])  # fmt: skip
def test_limits_hold_and_no_earlier_than_they_should(kind, program, happened):
    assert run(kind, program)[0][0] == happened


def test_calling_the_alarm_off_wins_no_time(kind):
    program = "import signal, time\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile time.process_time() < 0.7: pass"
    assert run(kind, program, test_s=0.5)[0][0] == FAILED  # it ends by itself, before the kernel's whole second is up


def test_a_program_has_three_open_files(kind):
    program = "import os\nfor fd in range(64):\n    try: os.fstat(fd); print(fd, end=' ')\n    except OSError: pass"
    assert run(kind, program) == [(OUTPUT, b"0 1 2 ")]


def test_threads_work_since_deep_recursion_is_often_run_in_one(kind):
    program = (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 * 2**20)\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
        "threading.Thread(target=lambda: print(depth(50_000))).start()"  # never joined: an ordinary end waits for it
    )
    assert run(kind, program) == [(OUTPUT, b"50000\n")]


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 14), reason="these versions of Python bound recursion through C themselves")
def test_a_cached_function_may_recurse_deeply_through_c(kind):
    program = (
        "import sys, functools\nsys.setrecursionlimit(10**6)\n@functools.cache\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\nprint(depth(30_000))"
    )
    assert run(kind, program) == [(OUTPUT, b"30000\n")]


THREAD_BOMB = """
import threading, time
threading.stack_size(32768)
while True:
    try:
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
    except RuntimeError:
        time.sleep(0.2)
"""


def test_threads_beyond_the_cap_end_the_program(kind):
    if kind == "bubblewrap" and os.getuid() != 0:
        assert run(kind, THREAD_BOMB)[0][0] == FAILED  # refused one by one by the kernel; the CPU limit ends it
    else:
        with pytest.raises(TooManyThreadsError):
            run(kind, THREAD_BOMB)


def test_threads_are_counted_across_descendants():
    program = "import threading, time, os\n[threading.Thread(target=time.sleep, args=(9,)).start() for _ in range(5)]\nos.fork()\nprint(flush=True)\ntime.sleep(9)"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline(), process.stdout.readline()
        assert count_threads(process.pid) == 7  # six, and the child, into which only one of them was forked
        os.killpg(process.pid, signal.SIGKILL)
    assert count_threads(process.pid) == 0


@needs_bubblewrap
@pytest.mark.parametrize("path", [__file__, "/etc/passwd", "/proc/self/status", "/sys", "/dev/shm", "/bin", "tmp_path", str(ROOT / "pyproject.toml")])
def test_bubblewrap_hides_all_files_but_pythons_and_the_systems_libraries(path, tmp_path):
    path = str(tmp_path) if path == "tmp_path" else path
    assert os.path.exists(path)  # out here
    assert run("bubblewrap", f"import os\nprint(os.path.exists({path!r}))") == [(OUTPUT, b"False\n")]


@needs_bubblewrap
@pytest.mark.parametrize("path", ["x", "/x", "/tmp/x", "/box/x", "/dev/x", "/usr/x", f"{sys.prefix}/x", f"{sys.base_prefix}/lib/x"])
def test_nothing_is_writable_in_bubblewrap(path):
    program = f"try:\n    open({path!r}, 'w')\n    print('written')\nexcept OSError:\n    print('refused')"
    assert run("bubblewrap", program) == [(OUTPUT, b"refused\n")]


@needs_bubblewrap
def test_an_installed_package_is_hidden_with_its_solutions(monkeypatch):
    monkeypatch.setattr(sandbox, "_PACKAGE", Path(os.__file__).parent / "wsgiref")  # stands for site-packages/dgpo_jax
    assert run("bubblewrap", f"import os\nprint(os.listdir({str(sandbox._PACKAGE)!r}))") == [(OUTPUT, b"[]\n")]


@needs_bubblewrap
def test_the_program_is_nobody_alone_in_its_namespace():
    assert run("bubblewrap", "import os\nprint(os.getuid(), os.getppid(), os.listdir())") == [(OUTPUT, b"65534 1 []\n")]


def test_installed_libraries_can_be_imported(kind):
    assert run(kind, "import numpy\nprint(numpy.arange(4).sum())", memory_mb=1024, test_s=4.0) == [(OUTPUT, b"6\n")]


def test_nothing_of_the_users_environment_gets_in(kind, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    ((happened, output),) = run(kind, "import os\nprint(dict(os.environ))")
    assert happened == OUTPUT and b"s3cret" not in output and b"SECRET" not in output


def test_the_order_of_a_set_is_the_same_in_each_run(kind):
    program = "print(''.join({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'}))"
    assert run(kind, program) == run(kind, program)


@pytest.mark.parametrize("program", ["def f(:", "x = 1\0", "(" * 1000, "print('\udc80')", "return"])
def test_what_does_not_compile_is_told_apart_and_compiled_inside(kind, program):
    assert run(kind, program, ["", ""]) == [(UNPARSABLE, b"")]


def test_wall_time_is_a_backstop_for_programs_that_wait(kind):
    started = time.monotonic()
    with pytest.raises(LateError):
        run(kind, "import time\ntime.sleep(1000)", wall_s=0.5)
    assert 0.4 < time.monotonic() - started < 10


def test_nothing_is_left_of_a_run_that_was_cut_short(kind):
    with Run(kind, WAITS, LIMITS) as started:
        folder, pid = started._folder, started.process.pid
        pids = [pid, *wait_for_the_tested(started, kind)]
        assert all(map(is_alive, pids))
    assert wait_until(lambda: not any(map(is_alive, pids)))
    assert folder is None or not Path(folder).exists()


@needs_bubblewrap
def test_bubblewrap_gives_a_program_namespaces_of_its_own():
    with Run("bubblewrap", WAITS, LIMITS) as started:
        tested = wait_for_the_tested(started, "bubblewrap")[-1]
        for name in ("net", "pid", "ipc", "uts", "mnt", "user"):
            assert os.readlink(f"/proc/{tested}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


# The child that compiles a program ends by itself; after the first test's frame, the next child is one that waits.
WAITS = {
    "program": "import time\nif input() == 'wait':\n    time.sleep(1000)",
    "inputs": ["pass", "wait"], "fn_name": None,
}  # fmt: skip


def wait_for_the_tested(started, kind):
    """The processes below a run of WAITS, once the one that waits is there; it is the last."""
    assert next(started.frames())[0] == OUTPUT
    expected = 2 if kind == "bubblewrap" else 1
    assert wait_until(lambda: len(descendants(started.process.pid)) == expected)
    return descendants(started.process.pid)


def descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return []
    return [int(child) for child in children] + [pid for child in children for pid in descendants(child)]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_sandbox_dies_with_the_trainer(kind):
    trainer = (
        "from dgpo_jax.rewards.sandbox import *\n"
        "import threading\n"
        f"run = Run({kind!r}, {WAITS!r}, Limits())\nframes = run.frames()\nnext(frames)\n"
        "print(run.process.pid, run._folder or '', flush=True)\nlist(frames)"
    )
    with subprocess.Popen([sys.executable, "-c", trainer], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        pid, *folder = process.stdout.readline().split()
        assert wait_until(lambda: len(descendants(int(pid))) >= (2 if kind == "bubblewrap" else 1))
        pids = [int(pid), *descendants(int(pid))]
        process.kill()
    assert wait_until(lambda: not any(map(is_alive, pids)))
    for path in folder:  # a killed trainer cannot clean up
        shutil.rmtree(path)


def test_a_sandbox_that_dies_says_why(kind, monkeypatch):
    monkeypatch.setattr(sandbox, "make_command", lambda kind: ["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"])
    with pytest.raises(DiedError, match=r"^the reason$"):
        run(kind, "print(1)")


def test_a_report_longer_than_a_program_may_write_is_not_read(kind, monkeypatch):
    header = sandbox.FRAME.pack(OUTPUT, 0.0, 2**32 - 1)
    monkeypatch.setattr(sandbox, "make_command", lambda kind: [sys.executable, "-c", f"import os; os.write(1, {header!r}); input()"])
    with pytest.raises(DiedError, match="4294967295 bytes"):
        run(kind, "print(1)")


def test_starting_from_several_threads_is_safe(kind):
    results = []
    threads = [threading.Thread(target=lambda i=i: results.append((i, run(kind, f"print({i})")))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(i, [(OUTPUT, f"{i}\n".encode())]) for i in range(4)]


# ---- when a sandbox is refused


def put_on_path(monkeypatch, folder, script=None):
    if script is not None:
        (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_missing_bubblewrap_is_refused_with_what_to_install_and_what_the_other_way_costs(monkeypatch, tmp_path):
    put_on_path(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"bwrap.*not on the PATH; install it \(Debian: apt install bubblewrap\), or set code.sandbox=rlimits.*read, write and delete"):
        probe("bubblewrap")


def test_forbidden_namespaces_are_refused_in_the_words_of_bubblewrap(monkeypatch, tmp_path):
    put_on_path(monkeypatch, tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(ValueError, match=r"does not start here \(bwrap: No permissions to create new namespace\).*user namespaces.*code.sandbox=rlimits"):
        probe("bubblewrap")


def test_a_sandbox_that_holds_nothing_is_found_out(monkeypatch, tmp_path):
    put_on_path(monkeypatch, tmp_path, 'while [ "$1" != "--" ]; do shift; done; shift; exec "$@"')
    with pytest.raises(ValueError, match=r"does not hold here.*True True True False"):  # its files are there to be read
        probe("bubblewrap")


def test_a_kernel_without_the_filter_is_found_out(monkeypatch):
    monkeypatch.setattr(sandbox, "filter_bytes", lambda: bytes.fromhex("060000000000ff7f"))  # one step: allow
    with pytest.raises(ValueError, match=r"does not hold here.*False False False False"):
        probe("rlimits")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'docker'.*choose one of bubblewrap, rlimits"):
        probe("docker")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="on Linux only, and this is darwin"):
        probe("rlimits")


def test_rlimits_start_python_alone():
    assert make_command("rlimits")[0] == sys.executable
