"""Runs inside the sandbox: one process per response, and a fresh child of it for every test case.

It is handed to Python as text (`python -c`), because the package is not visible in there, so it imports the standard
library only, and of that little: `signal`, `json` or `contextlib` would cost milliseconds of every response. Its standard
input is a file with one dict, by `marshal`, which only the trainer writes:

    program, inputs       text to run; per test case, a text for standard input or a list of arguments
    fn_name               the function to call, or null for the stdin/stdout form
    test_s, total_s       CPU seconds of one test case, and of all
    memory_mb, output_kb  address space of a test case; what it may write
    threads               RLIMIT_NPROC, or null
    paths                 folders to import installed packages from
    parent                process id of whoever started this, or null where that is another namespace
    filter                the seccomp filter, bytes

Its standard output is one FRAME per test case, in order, each followed by `length` bytes: what the program printed, or
what the function returned, as JSON. Expected outputs are not here: whoever started this compares. So a program that got
hold of everything in the sandbox would still have to find the outputs by itself.
"""

import builtins
import ctypes
import gc
import marshal
import math
import os
import resource
import struct
import sys

FRAME = struct.Struct("<BdI")  # what happened, CPU seconds of the test case, length
FAILED, OUTPUT, UNPARSABLE = 0, 1, 2

# What LeetCode's answers take for granted, and so the answers of models that learned from them: function-call form only.
PRELUDE = """
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import ceil, comb, floor, gcd, inf, isqrt, lcm, log, log2, sqrt
import bisect, collections, functools, heapq, itertools, math, re, string
"""
# Imported before the fork where the program names them, so that not every test case pays for it anew.
WORTH_SHARING = ("bisect", "collections", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq",
                 "itertools", "math", "numpy", "operator", "random", "re", "statistics", "string", "threading", "typing")  # fmt: skip
MIB = 2**20
STACK = 64 * MIB  # of the main thread: deep recursion through C, such as a cached function's, needs it
OPEN_FILES = 64
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_SECCOMP_MODE_FILTER = 2
_SIGKILL, _SIGXFSZ, _ITIMER_PROF = 9, 25, 2
_CAPABILITY_VERSION_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True)


def main():
    """Runs every test case of the job on standard input."""
    _prctl(_PR_SET_DUMPABLE, 0)  # nobody may open /proc/<this process>/fd or mem, the tested program included
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    with open(0, "rb", closefd=False) as file:
        job = marshal.loads(file.read())
    if job["parent"] is not None and os.getppid() != job["parent"]:
        return  # it died before the line above tied this process to it
    sys.path += job["paths"]
    builtins.exit = builtins.quit = sys.exit  # as the module `site` does, which takes ten milliseconds
    with open(1, "wb", buffering=0, closefd=False) as report:
        compiled = _run(lambda: _compile(job["program"]), job, "", 1, math.ceil(job["test_s"]))
        if compiled[0] == FAILED:
            _send(report, UNPARSABLE, compiled[1], b"")
            return
        _import_what_is_shared(job)
        left = job["total_s"]
        for test in job["inputs"]:
            happened, cpu_s, output = _run_test(job, test, left)
            left -= cpu_s
            _send(report, happened, cpu_s, output)


def _send(report, happened, cpu_s, output):
    data = memoryview(FRAME.pack(happened, cpu_s, len(output)) + output)
    while data:
        data = data[report.write(data):]


def _import_what_is_shared(job):
    """After the program has been found to compile. These are the interpreter's own files: nothing of the program runs."""
    for name in WORTH_SHARING:
        if name in job["program"]:
            try:
                __import__(name)
            except ImportError:  # not installed: the program will meet this itself
                continue
    job["prelude"] = {}
    if job["fn_name"] is not None:
        exec(PRELUDE, job["prelude"])
        __import__("json")
    gc.collect()
    gc.freeze()  # children would copy every page that a collection touches


def _run_test(job, test, left_s):
    """(what happened, CPU seconds, output) of one test case, given the CPU seconds that are left for all of them."""
    if left_s <= 0:
        return FAILED, 0.0, b""
    limit_s = min(job["test_s"], left_s)
    if job["fn_name"] is None:
        happened, cpu_s, output = _run(lambda: _run_program(job["program"]), job, test, 1, limit_s)
    else:
        happened, cpu_s, output = _run(lambda: _call(job, test), job, "", 3, limit_s)
    return (happened, cpu_s, output) if cpu_s <= limit_s else (FAILED, cpu_s, b"")


def _run(action, job, text, descriptor, limit_s):
    """Runs action() in a child whose standard input is `text`; collects what it wrote to the descriptor.

    Files in memory, not pipes: input and output need nobody to move them, and RLIMIT_FSIZE stops a flood at once.
    """
    source, sink = os.memfd_create("input"), os.memfd_create("output")
    with open(source, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(source, 0, os.SEEK_SET)
    runner, child = os.getpid(), os.fork()
    if child == 0:
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != runner:
            os._exit(1)  # it died before the line above tied this process to it
        _become_test(source, sink, descriptor, job, limit_s)
        os._exit(_exit_status(action))
    _, status, usage = os.wait4(child, 0)
    output = b""
    if status == 0:
        with open(sink, "rb", closefd=False) as file:
            file.seek(0)
            output = file.read(job["output_kb"] * 1024)
    os.close(source)
    os.close(sink)
    return OUTPUT if status == 0 else FAILED, usage.ru_utime + usage.ru_stime, output


def _exit_status(action):
    """What Python's own end does, less taking the interpreter apart, which is three milliseconds of every test case."""
    try:
        status = 0
        try:
            action()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        while "threading" in sys.modules and (others := _threads_to_wait_for(sys.modules["threading"])):
            others[0].join()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        if not sys.stdout.closed:
            sys.stdout.flush()
        return status & 0xFF
    except BaseException:  # the program's, whatever it was: this test case has failed, and nobody reads why
        return 1


def _threads_to_wait_for(threading):
    return [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.current_thread()]


def _become_test(source, sink, descriptor, job, limit_s):
    """Leaves nothing in the child that it was not meant to have."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    wanted = {0: source, 1: nowhere, 2: nowhere, descriptor: sink}
    spare = [os.dup(wanted[place]) for place in sorted(wanted)]  # beyond the places that are about to be filled
    for place, file in zip(sorted(wanted), spare, strict=True):
        os.dup2(file, place)
    os.closerange(len(wanted), 1 << 16)
    for place, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = open(place, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - for good
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    _LIBC.signal(_SIGXFSZ, None)  # the default, which is to die; Python ignores it, and the program would go on
    for name, limit in _limits(job, limit_s).items():
        ceiling = resource.getrlimit(name)[1]  # of the shell or the batch system, which nobody may raise
        ceiling = sys.maxsize if ceiling == resource.RLIM_INFINITY else ceiling
        hard = limit + (name == resource.RLIMIT_CPU)  # the lower limit's signal can be ignored, SIGKILL cannot
        resource.setrlimit(name, (min(limit, ceiling), min(hard, ceiling)))
    # RLIMIT_CPU knows whole seconds only, but holds whatever the program does; this signal a program could ignore.
    whole, part = divmod(round(limit_s * 1e6), 10**6)
    _LIBC.setitimer(_ITIMER_PROF, struct.pack("4l", 0, 0, whole, part), None)
    _give_up_privileges()
    _forbid(job["filter"])


def _limits(job, limit_s):
    limits = {
        resource.RLIMIT_CPU: max(1, math.ceil(limit_s)),
        resource.RLIMIT_AS: job["memory_mb"] * MIB,
        resource.RLIMIT_FSIZE: job["output_kb"] * 1024,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: STACK,
        resource.RLIMIT_CORE: 0,
    }
    return limits if job["threads"] is None else {**limits, resource.RLIMIT_NPROC: job["threads"]}


def _give_up_privileges():
    """Matters where root runs this: it could raise its limits again, and read everybody's files."""
    header, nothing = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    if _LIBC.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _forbid(steps):
    """Installs the seccomp filter, for good."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    program = Program(len(steps) // 8, steps)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _prctl(option, *values):
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _LIBC.prctl(option, *padded) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def _compile(program):
    return compile(program, "<program>", "exec", dont_inherit=True)


def _new_module(name):
    module = type(sys)(name)
    sys.modules[name] = module  # dataclasses and others look there for the module of a class
    return module


def _run_program(program):
    module = _new_module("__main__")
    exec(_compile(program), module.__dict__)


def _call(job, arguments):
    """Calls the function, or the method of LeetCode's class Solution, and writes what it returns to descriptor 3."""
    module = _new_module("solution")  # not __main__, so that the program's own trial run stays out
    module.__dict__.update({name: value for name, value in job["prelude"].items() if not name.startswith("__")})
    exec(_compile(job["program"]), module.__dict__)
    name = job["fn_name"]
    owner = module if name in module.__dict__ else module.Solution()
    value = getattr(owner, name)(*arguments)
    returned = sys.modules["json"].dumps(value, default=lambda part: part.tolist())  # numpy's; anything else is an error
    with open(3, "w", encoding="utf-8") as file:
        file.write(returned)


if __name__ == "__main__":
    main()
