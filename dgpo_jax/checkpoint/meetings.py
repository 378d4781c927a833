"""How the processes that write one checkpoint wait for each other, and how none waits for one that failed.

Orbax has all of them meet twice in the background, when their parts are written and when process 0 has put the whole in
place. One whose part fails would not come: the others would wait 20 minutes, and count one meeting more than it in all
later saves, none of which would then succeed (seen with Orbax 0.12). So meetings are named after their save, and one that
failed says so and comes all the same.
"""

import errno
import itertools
import logging
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dgpo_jax.checkpoint.folders import DETAILS, in_words

log = logging.getLogger(__name__)

MEETINGS = 2  # of one save
_saves = itertools.count()  # the same on every process: all of them begin the same saves


class PartMissingError(OSError):
    """Another process could not write its part."""


class Meetings:
    """Where the processes are in the save under way."""

    def __init__(self):
        self._save, self._met, self._missed, self._folder = 0, 0, False, Path()

    def begin(self, folder: Path) -> None:
        """A save to `folder` begins; all processes must call it."""
        self._save, self._met, self._missed, self._folder = next(_saves), 0, False, folder

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax calls to wait for the others, before it goes on to what counts on their parts.

        Raises:
            PartMissingError: one came that had failed.
            RuntimeError: one did not come in time.
        """
        del key  # Orbax uses the same one in every save
        self._wait(timeout_ms)
        require_parts(self._folder)

    def fail(self) -> None:
        """This process could not write its part: says so by deleting what no checkpoint can lack, and meets the others.

        A folder that it cannot reach it cannot take that from: then they wait in vain for as long as Orbax has them. After
        the last meeting there is nothing to say: all parts are written, and process 0 alone decides.
        """
        if jax.process_count() == 1 or (self._met == MEETINGS and not self._missed):
            return
        try:
            (self._folder / DETAILS).unlink(missing_ok=True)
            while self._met < MEETINGS and not self._missed:
                self._wait(ocp.AsyncOptions().timeout_secs * 1000)
        except (OSError, RuntimeError) as error:
            log.warning("the other processes could not be told: %s", in_words(error))

    def _wait(self, timeout_ms: int) -> None:
        self._met += 1
        name = f"checkpoint {self._save}, meeting {self._met}"
        try:
            ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=timeout_ms)
        except BaseException:
            self._missed = True  # whoever did not come to this one is not waited for again
            raise


def require_parts(folder: Path, names: tuple[str, ...] = ()) -> None:
    """Before a manifest is made, which would not miss what is lost by then.

    Raises:
        PartMissingError: another process failed.
        FileNotFoundError: something else is gone.
    """
    try:
        open(folder / DETAILS).close()  # a network disk asks its server at an open, but not always at a stat
    except FileNotFoundError:
        if jax.process_count() > 1:
            raise PartMissingError("another process could not write its part, and its log says why") from None
        raise
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / name))
