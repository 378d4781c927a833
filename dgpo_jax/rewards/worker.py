"""A process that checks answers: `python -m dgpo_jax.rewards.worker MEMORY_MB PARENT_PID`.

One JSON line in, [answer, extracted]; one JSON line out, the status. The first line out is "ready". It ends when its
standard input closes, and the kernel kills it if its parent dies in the middle of an answer (Linux).
"""

import json
import resource
import signal
import sys

from dgpo_jax.processes import die_with


def main(memory_mb, parent):
    """Serves until the input closes."""
    _restrict(memory_mb, parent)
    _status("x", "\\sqrt{x^2 + 1}")  # imports SymPy and fills its tables before the first deadline starts to count
    _reply("ready")
    for line in sys.stdin:
        _reply(_status(*json.loads(line)))


def _restrict(memory_mb, parent):
    """No core dumps, no Ctrl-C of the trainer's terminal; on Linux a memory limit, and death together with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS refuses limits on the address space
        _, ceiling = resource.getrlimit(resource.RLIMIT_AS)  # of the shell or the batch system, which nobody may raise
        memory = memory_mb * 2**20 if ceiling == resource.RLIM_INFINITY else min(memory_mb * 2**20, ceiling)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    die_with(parent)


def _status(answer, extracted):
    from dgpo_jax.rewards.math import slow_status

    try:
        return slow_status(answer, extracted)
    except MemoryError:
        return "crashed"
    except Exception as error:  # a fault of the checker, not of the answer: counted apart and shown, never fatal
        print(f"verifier worker: {type(error).__name__}: {error} on {[answer, extracted]!r}", file=sys.stderr)
        return "crashed"


def _reply(status):
    sys.stdout.write(json.dumps(status) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
