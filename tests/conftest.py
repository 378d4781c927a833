"""Eight fake CPU devices for every test, and programs compiled fast and once; set here because JAX reads flags at its first import."""

import atexit
import functools
import inspect
import os
import shutil
import signal
import tempfile

import pytest

# On a busy box a fake device may wait minutes for another at a collective; by default that aborts the process.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
)


def share_compiled_programs():
    """One folder of compiled programs for all tests of a session: pytest's workers, and the commands that tests start.

    It is new in each session, so that no test meets what another version compiled.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # it has the folder of the process that started it
    folder = tempfile.mkdtemp(prefix="dgpo_jax_compiled_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def remember_sources_of_classes():
    """tyro reads each config class's comments anew for every command line, and up to Python 3.12 that parses the whole file."""
    read = inspect.getsource
    of_class = functools.cache(read)
    inspect.getsource = lambda thing: of_class(thing) if isinstance(thing, type) else read(thing)


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
# LLVM took half of all time, to optimise loops over tiny arrays. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests programs as users get
# them. In the environment, so that commands that tests start are compiled alike: their results are compared to the bit.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
share_compiled_programs()
remember_sources_of_classes()


@pytest.fixture
def pipe():
    """The function path -> path, which puts a named pipe there; a test that waits for its other end fails after ten seconds."""

    def fail(*_):
        raise AssertionError("it waits for the other end of a pipe")

    def make(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
