"""Runs a module as `python -m` does, until it touches a certain file: then it dies by SIGKILL, before that happens.

    python tests/die_at.py '*/rollouts/iteration_000003.jsonl' dgpo_jax.train --config=tests/tiny_config.py

The program itself is as it is: Python tells of every opened, renamed and created file (audit events). So a test meets
the moment it means, on a fast machine and on a busy one.
"""

import fnmatch
import os
import runpy
import signal
import sys

EVENTS = ("open", "os.rename", "os.mkdir")


def die_at(pattern):
    """From now on, touching a path that matches kills this process; a renamed file counts by its new name."""

    def hook(event, arguments):
        if event in EVENTS:
            path = arguments[1] if event == "os.rename" else arguments[0]
            if not isinstance(path, int) and fnmatch.fnmatchcase(os.fsdecode(path), pattern):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    pattern, module = sys.argv[1:3]
    sys.argv[:] = [module, *sys.argv[3:]]
    sys.path[0] = os.getcwd()  # as under `python -m`
    die_at(pattern)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
