"""The sampler's desk: which response is in which slot, and which come next. Host numpy."""

from typing import NamedTuple

import numpy as np


class Begin(NamedTuple):
    """A response that gets a slot."""

    slot: int
    source: int  # row of the prefilled prompts
    response: int  # b


class Desk:
    """Seats B responses, in order and each replica its own share, in `rows` slots of every replica.

    Args:
        prompts: Q; replica r answers the prompts Q * r / replicas to Q * (r + 1) / replicas.
        group_size: G; response q * G + g is of prompt q.
        held: prompts that a prefill holds for each replica.
    """

    def __init__(self, prompts: int, group_size: int, replicas: int, rows: int, held: int):
        borders = np.arange(replicas + 1) * prompts // replicas * group_size
        self.group_size, self.held = group_size, held
        self.next, self.end = borders[:-1].copy(), borders[1:]  # the next response of each replica that gets a slot
        self.first_held = np.full(replicas, -held)  # the first prompt that the last prefill ran for it
        self.seats = np.full((replicas, rows), -1)  # the response in each slot, -1 = none

    @property
    def waiting(self) -> bool:
        """Some response has not got a slot yet."""
        return bool((self.next < self.end).any())

    @property
    def most_taken(self) -> int:
        """Slots in use on the replica that uses most."""
        return int((self.seats >= 0).sum(axis=1).max())

    @property
    def wants_slots(self) -> bool:
        """There are a free slot and a response that waits for one, on the same replica."""
        return bool(((self.next < self.end) & (self.seats < 0).any(axis=1)).any())

    def next_prompts(self) -> np.ndarray:
        """i64[replicas, held]: the prompts to run next, so that those that wait can begin; the last is repeated."""
        last = np.maximum(self.end - 1, 0) // self.group_size
        self.first_held = np.minimum(self.next // self.group_size, last)
        return np.minimum(self.first_held[:, None] + np.arange(self.held), last[:, None])

    def seat(self) -> list[list[Begin]]:
        """Gives free slots, of each replica, to responses whose prompts are held."""
        begun = []
        for replica, seats in enumerate(self.seats):
            beyond = min(self.end[replica], (self.first_held[replica] + self.held) * self.group_size)
            pairs = list(zip(np.flatnonzero(seats < 0).tolist(), range(self.next[replica], beyond), strict=False))
            begun.append([Begin(slot, b // self.group_size - int(self.first_held[replica]), b) for slot, b in pairs])
            for slot, response in pairs:
                seats[slot] = response
            self.next[replica] += len(pairs)
        return begun

    def gather(self, rows: int) -> list[list[tuple[int, int]]]:
        """Moves whoever sits behind the first `rows` slots to free ones among them: (from, to) for each replica."""
        moved = []
        for seats in self.seats:
            pairs = list(zip((rows + np.flatnonzero(seats[rows:] >= 0)).tolist(), np.flatnonzero(seats[:rows] < 0).tolist(), strict=False))
            for source, target in pairs:
                seats[target], seats[source] = seats[source], -1
            moved.append(pairs)
        return moved

    def rise(self, rows: int, active: np.ndarray) -> np.ndarray:
        """Frees the slots of responses that have ended.

        Args:
            active: bool[replicas, rows], of the first `rows` slots.
        Returns:
            i64[X], these responses in ascending order.
        """
        seats = self.seats[:, :rows]
        ended = (seats >= 0) & ~active
        responses = np.sort(seats[ended])
        seats[ended] = -1
        return responses
