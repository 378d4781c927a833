"""Says what a run waits for when nothing moves, instead of hanging at 0 % without a word. Standard library only.

A thread that looks now and then how long ago `activity.beat` was called. After `seconds` of silence it prints one line (which
process, what it does and waits for) and writes the stacks of all threads to a file. If it is to stop the run, it
asks for that, and when nothing has moved after `seconds` more it ends the process: what hangs in a library cannot
be called back, and the last checkpoint is sound.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dgpo_jax import activity
from dgpo_jax.processes import NOTHING_MOVED


class Watchdog(threading.Thread):
    """A context manager; inside it silence is noticed.

    Args:
        seconds: of silence that are too many; 0 = never.
        folder: where stacks are written; made when it is needed.
        who: such as "process 1 of 4 on tpu-vm-1"; "" where there is one only.
        stop: asks the run to stop, given the reason; None = only report.
    """

    def __init__(self, seconds: float, folder: Path, who: str = "", stop: Callable[[str], object] | None = None):
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.folder, self.who, self.stop = seconds, folder, who, stop
        self._done = threading.Event()

    def __enter__(self):
        if self.seconds:
            activity.beat()
            self.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Until the context is left."""
        reported = False
        while not self._done.wait(min(1.0, self.seconds / 10)):
            silent = activity.silence()
            if silent < self.seconds:
                reported = False
            elif not reported:
                reported = True
                self.report(silent)
                if self.stop is not None:
                    self.stop(f"nothing has moved for {silent:.0f} s")
            elif self.stop is not None and silent > 2 * self.seconds:
                print(f"watchdog: still nothing has moved; leaving with exit code {NOTHING_MOVED}, the last checkpoint is intact", file=sys.stderr, flush=True)
                os._exit(NOTHING_MOVED)

    def report(self, silent: float) -> None:
        """The line, and the file with stacks."""
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        where = f" on {self.who}" if self.who else ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                file.write(f"nothing has moved for {silent:.0f} s{where}: {activity.describe()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"stacks of all threads in {path}"
        except OSError as error:
            stacks = f"stacks could not be written to {path}: {error.strerror}"
        print(f"watchdog: nothing has moved for {silent:.0f} s{where}: {activity.describe()}; {stacks}", file=sys.stderr, flush=True)
