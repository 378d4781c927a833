"""Says what a run waits for when nothing moves, instead of hanging at 0 % without a word. Standard library only.

A thread that looks now and then whether `activity` has moved. After `seconds` of silence it prints one line (which
process, what it does and waits for) and writes the stacks of all threads to a file. If it is to stop the run, it
asks for that, and when nothing has moved after `seconds` more it ends the process: what hangs in a library cannot
be called back, and the last checkpoint is sound.

Of several processes all wait for the slowest. While one of them moves none is silent, and the line names the one that moved last.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from dgpo_jax import activity
from dgpo_jax.processes import NOTHING_MOVED


class Peer(NamedTuple):
    """What is known of another process."""

    beats: int
    since: float  # on our clock
    words: str


class Watchdog(threading.Thread):
    """A context manager; inside it silence is noticed.

    Args:
        seconds: of silence that are too many; 0 = never.
        folder: where stacks are written; made when it is needed.
        who: such as "process 1 of 4 on tpu-vm-1"; "" where there is one only.
        stop: asks the run to stop, given the reason; None = only report.
        exchange: puts up a text for the other processes, and returns what each of them, by its number, has put up.
    """

    def __init__(
        self, seconds: float, folder: Path, who: str = "", stop: Callable[[str], object] | None = None,
        exchange: Callable[[str], Mapping[int, str]] = lambda text: {},
    ):  # fmt: skip
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.folder, self.who, self.stop, self.exchange = seconds, folder, who, stop, exchange
        self._done = threading.Event()
        self._peers: dict[int, Peer] = {}

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
        reported, exchanged = False, -self.seconds
        while not self._done.wait(min(1.0, self.seconds / 10)):
            now = time.monotonic()
            if now - exchanged > self.seconds / 10:
                self._look_at_peers()
                exchanged = now
            silent = self._silence()
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

    def _look_at_peers(self) -> None:
        """Tells them how often something has moved here, and learns it of them. No clock of theirs is read."""
        for number, text in self.exchange(f"{activity.beats()} {activity.describe()}").items():
            beats, _, words = text.partition(" ")
            known = self._peers.get(number)
            moved = known is None or known.beats != int(beats)
            self._peers[number] = Peer(int(beats), time.monotonic() if moved else known.since, words)

    def _silence(self) -> float:
        """Seconds since anything has moved, on any process."""
        activity.beats()
        peers = [time.monotonic() - peer.since for peer in self._peers.values()]
        return min([activity.silence(), *peers])

    def _last_mover(self) -> str:
        """Of the other processes, in words."""
        if not self._peers:
            return ""
        number, peer = max(self._peers.items(), key=lambda item: item[1].since)
        return f"; the last of the others that moved is process {number}: {peer.words}"

    def report(self, silent: float) -> None:
        """The line, and the file with stacks."""
        path = self.folder / f"{'-'.join([time.strftime('%Y%m%d-%H%M%S'), *self.who.split(), str(os.getpid())])}.txt"  # pids of pods are alike
        where = f" on {self.who}" if self.who else ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                file.write(f"nothing has moved for {silent:.0f} s{where}: {activity.describe()}{self._last_mover()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"stacks of all threads in {path}"
        except OSError as error:
            stacks = f"stacks could not be written to {path}: {error.strerror}"
        line = f"watchdog: nothing has moved for {silent:.0f} s{where}: {activity.describe()}{self._last_mover()}; {stacks}"
        print(line, file=sys.stderr, flush=True)
