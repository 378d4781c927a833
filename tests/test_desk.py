"""Who sits in which slot: every response once, in the slots of its own replica, with its own prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_jax.rl.desk import Begin, Desk


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_ends_when_each_response_gets_one_slot_and_its_own_prompt(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    prompts, group_size, replicas, rows, held = draw(1, 9), draw(1, 4), draw(1, 4), draw(1, 6), draw(1, 3)
    desk = Desk(prompts, group_size, replicas, rows, held)
    begun, ended, prefilled = [], [], None
    for _ in range(1000):
        if not desk.waiting and not desk.most_taken:
            break
        while desk.wants_slots:
            seated = desk.seat()
            if not any(seated):
                prefilled = desk.next_prompts()
                assert ((prefilled >= 0) & (prefilled < prompts)).all()
                continue
            for replica, entries in enumerate(seated):
                for entry in entries:
                    assert desk.seats[replica, entry.slot] == entry.response
                    assert prefilled[replica, entry.source] == entry.response // group_size
                    assert prompts * replica // replicas <= entry.response // group_size < prompts * (replica + 1) // replicas
                    begun.append(entry.response)
        active = np.array(data.draw(st.lists(st.booleans(), min_size=replicas * rows, max_size=replicas * rows)))
        ended += desk.rise(rows, active.reshape(replicas, rows)).tolist()
    else:
        ended += desk.rise(rows, np.zeros((replicas, rows), bool)).tolist()
    if not desk.waiting:
        assert sorted(begun) == list(range(prompts * group_size))
    assert len(set(begun)) == len(begun) and set(ended) <= set(begun)


def test_slots_are_given_in_order_and_a_freed_one_again():
    desk = Desk(prompts=3, group_size=2, replicas=1, rows=3, held=2)
    assert not any(desk.seat())  # nothing is prefilled yet
    assert desk.next_prompts().tolist() == [[0, 1]]
    assert desk.seat() == [[Begin(0, 0, 0), Begin(1, 0, 1), Begin(2, 1, 2)]]
    assert not desk.wants_slots and desk.waiting
    assert desk.rise(3, np.array([[True, False, True]])).tolist() == [1]
    assert desk.seat() == [[Begin(1, 1, 3)]]  # prompt 1 is still held
    assert desk.rise(3, np.array([[False, True, True]])).tolist() == [0]
    assert not any(desk.seat()) and desk.wants_slots  # prompt 2 is not
    assert desk.next_prompts().tolist() == [[2, 2]]
    assert desk.seat() == [[Begin(0, 0, 4)]]


def test_those_behind_the_first_rows_move_into_free_ones():
    desk = Desk(prompts=6, group_size=1, replicas=1, rows=6, held=6)
    desk.next_prompts()
    desk.seat()
    desk.rise(6, np.array([[False, True, False, False, True, True]]))
    assert desk.most_taken == 3
    assert desk.gather(3) == [[(4, 0), (5, 2)]]
    assert desk.seats.tolist() == [[4, 1, 5, -1, -1, -1]]


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_replica_without_prompts_stays_empty(prompts):
    desk = Desk(prompts, group_size=2, replicas=4, rows=2, held=1)
    assert (desk.next_prompts() < prompts).all()
    assert sum(map(bool, desk.seat())) == prompts
