"""How the processes that write one checkpoint wait for each other, and how none waits for one that failed.

Orbax has all of them meet twice in the background, when their parts are written and when process 0 has put the whole in
place. One whose part fails would not come: the others would wait for as long as Orbax has them, and count one meeting more
than it in all later saves, none of which would then succeed (seen with Orbax 0.12). So meetings are named after their save,
and one that failed says so and comes all the same.

It says so through JAX's coordination service and not on the disk, which may be what failed: each process has one key,
overwritten whenever a save of its fails, so that a long run leaves no more keys behind than there are processes.

One whose write hangs, as on a network disk without its server, cannot come. The others wait for 10 minutes and as long
as a disk of 50 MB/s takes for the whole checkpoint: 11 minutes for 135 million parameters in float32 with AdamW's moments,
38 for 7 billion. (Orbax's own limit, 20 minutes whatever the size, would break off a slow disk's every save of the latter,
and it counts for a single process too.) Meanwhile the run goes on until its next save. Then this one has failed, on all,
and the log says whom they waited for; the one that hangs gives up by itself, by the same clock. A few waits are Orbax's
alone: 5 minutes for process 0 to make the folder, and no limit for one that hangs before it has begun; `activity` names them.
"""

import itertools
import logging
import re
import time

import orbax.checkpoint as ocp

from dgpo_jax import activity, hosts
from dgpo_jax.checkpoint.folders import in_words

log = logging.getLogger(__name__)

PATIENCE_S, SLOWEST_DISK = 600, 50_000_000  # at least; bytes per second, of all processes together
TOO_SLOW = "the disk hangs, or is slower than 50 MB/s"
FAREWELL_S = 10.0  # at least so long one that failed waits for the others: those who wait count from moments later
MEETINGS = ("waiting for all to write their parts", "waiting for process 0 to put it in place")
FAILED = "checkpoint_failed"  # topic of `hosts.tell`: `save why`, of the last save that a process failed in
_ABSENT = re.compile(r"timed out task names:\s*([\d\s]*\d)")  # how JAX's service says which did not come
_saves = itertools.count()  # the same on every process: all of them begin the same saves


class PartMissingError(OSError):
    """Another process could not write its part, or did not come."""


def patience(size: int) -> int:
    """Seconds that a save of so many bytes may take, from the moment when the state is copied."""
    return PATIENCE_S + size // SLOWEST_DISK


class Meetings:
    """Where the processes are in the save under way.

    Raises:
        RuntimeError: as of `hosts.told`; now, when the run starts, and not at its first checkpoint.
    """

    def __init__(self):
        if hosts.count() > 1:
            hosts.told(FAILED)
        self._save, self._name, self._seconds, self._deadline = 0, "", 0.0, 0.0
        self._met, self._missed, self._known = 0, False, False

    def begin(self, name: str, seconds: float) -> None:
        """A save begins; all processes must call it.

        Args:
            name: of its folder.
            seconds: from `patience`.
        """
        self._save, self._name, self._seconds, self._deadline = next(_saves), name, seconds, time.monotonic() + seconds
        self._met, self._missed, self._known = 0, False, False

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax calls to wait for the others, before it goes on to what counts on their parts.

        Raises:
            PartMissingError: one came that had failed, or one did not come in time.
        """
        del key  # Orbax uses the same one in every save
        self._wait(timeout_ms / 1000)
        failed = self._failed()
        if failed:
            self._known = True
            others = f" (nor could {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise PartMissingError(f"process {failed[0][0]} could not write its part{others}: {failed[0][1]}")

    def fail(self, why: str) -> None:
        """This process could not write its part, or was told so of another: says it, unless all know, and meets the others.

        Where it cannot say it, it does not come either: a checkpoint without its part must not be taken for whole. After the
        last meeting there is nothing to say: all parts are written, and process 0 alone decides.
        """
        if hosts.count() == 1 or (self._met == len(MEETINGS) and not self._missed):
            return
        try:
            if not self._known:
                hosts.tell(FAILED, f"{self._save} {why}")
            while self._met < len(MEETINGS) and not self._missed:
                self._wait(max(self._deadline - time.monotonic(), FAREWELL_S))
        except (OSError, RuntimeError) as error:
            log.warning("the other processes may not know that this one could not write its part: %s", in_words(error))

    def _failed(self) -> list[tuple[int, str]]:
        """Which processes have said that they failed in this save, and why."""
        if hosts.count() == 1:
            return []
        said = [(process, *text.split(" ", 1)) for process, text in hosts.told(FAILED).items()]
        return sorted((process, why) for process, save, why in said if int(save) == self._save)

    def _wait(self, seconds: float) -> None:
        """Raises PartMissingError where one does not come in time."""
        what, until = MEETINGS[self._met], time.monotonic() + seconds
        self._met += 1
        key = f"checkpoint {self._save}, meeting {self._met}"
        try:
            with activity.doing(f"{self._name}: {what}", lambda: f"gives up in {max(until - time.monotonic(), 0) / 60:.0f} minutes"):
                ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(seconds * 1000))
        except BaseException as error:
            self._missed = True  # whoever did not come to this one is not waited for again
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            absent = _ABSENT.search(str(error))
            who = f"process {', '.join(absent[1].split())}" if absent else "another process"
            raise PartMissingError(f"{what}: {who} did not come in {self._seconds / 60:.0f} minutes; {TOO_SLOW}") from error

