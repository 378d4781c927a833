"""Groups of responses: choosing, joining and keeping them, always whole."""

import jax
import numpy as np
import pytest

from dgpo_jax.rl.experience import (
    by_group,
    from_arrays,
    group_count,
    group_size,
    join,
    lengths,
    newest,
    no_groups,
    select,
    to_arrays,
)
from dgpo_jax.types import Experience, Prompts, Rollout

MAX_PROMPT, MAX_RESPONSE = 2, 3


def make(*groups, size=2):
    """An experience whose every number tells its group, and those of a response its place in the group too."""
    names = np.array(groups, np.int32)
    rows = (10 * names[:, None] + np.arange(size)).reshape(-1).astype(np.int32)
    mask = np.arange(MAX_RESPONSE) <= rows[:, None] % 10  # sample 0 has one token, sample 1 two
    return Experience(
        prompts=Prompts(np.tile(names[:, None], (1, MAX_PROMPT)), np.arange(MAX_PROMPT) >= names[:, None] % 2),
        rollout=Rollout(
            np.where(mask, rows[:, None], 0).astype(np.int32), mask, np.where(mask, -rows[:, None], 0).astype(np.float32),
            rows % 10 == 1,
        ),
        old_logprobs=np.where(mask, -rows[:, None] / 2, np.nan).astype(np.float32),
        scores=np.float32(rows % 10 == 0), rewards=rows.astype(np.float32), iteration=names + 100,
    )  # fmt: skip


def assert_same(one, other):
    """Values, dtypes and shapes."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype and ours.shape == expected.shape


def test_counts_and_lengths():
    experience = make(4, 7, 1, size=3)
    assert (group_count(experience), group_size(experience)) == (3, 3)
    np.testing.assert_array_equal(lengths(experience), [1, 2, 3] * 3)
    np.testing.assert_array_equal(by_group(experience, experience.rewards), [[40, 41, 42], [70, 71, 72], [10, 11, 12]])


@pytest.mark.parametrize("chosen, expected", [
    ([0, 1, 2], (4, 7, 1)),
    ([1], (7,)),
    ([2, 0], (1, 4)),  # in the order asked for
    ([1, 1], (7, 7)),
])  # fmt: skip
@pytest.mark.parametrize("size", [2, 3])
def test_groups_are_chosen_with_everything_that_is_theirs(chosen, expected, size):
    for groups in (chosen, np.array(chosen)):
        assert_same(select(make(4, 7, 1, size=size), groups), make(*expected, size=size))


def test_choosing_no_group_leaves_none():
    for groups in ([], np.flatnonzero([False, False])):
        assert_same(select(make(4, 7), groups), no_groups(MAX_PROMPT, MAX_RESPONSE))


@pytest.mark.parametrize("count, expected", [
    (2, (7, 1)),
    (3, (4, 7, 1)),
    (5, (4, 7, 1)),  # there are no more
])  # fmt: skip
def test_the_newest_groups_are_the_last_in_their_order(count, expected):
    assert_same(newest(make(4, 7, 1), count), make(*expected))


def test_no_newest_groups_are_none():
    nothing = no_groups(MAX_PROMPT, MAX_RESPONSE)
    assert_same(newest(make(4, 7), 0), nothing)
    assert_same(newest(nothing, 2), nothing)


def test_joined_groups_stand_one_after_the_other():
    assert_same(join(make(4, 7), make(1)), make(4, 7, 1))
    assert_same(join(join(make(4), make(7)), make(1)), join(make(4), join(make(7), make(1))))


def test_cutting_in_two_and_joining_changes_nothing():
    whole = make(4, 7, 1, 5)
    assert_same(join(select(whole, [0]), select(whole, [1, 2, 3])), whole)


def test_no_groups_is_nothing_and_joins_to_anything():
    nothing = no_groups(MAX_PROMPT, MAX_RESPONSE)
    assert (group_count(nothing), group_size(nothing), len(lengths(nothing))) == (0, 0, 0)
    # Neither shapes nor dtypes change: a bool that became a number would be a checkpoint of another kind.
    assert_same(join(nothing, make(4, 7)), make(4, 7))
    assert_same(join(make(4, 7), nothing), make(4, 7))
    assert_same(join(nothing, nothing), nothing)
    assert_same(select(nothing, []), nothing)


def test_what_is_kept_in_a_checkpoint_comes_back(tmp_path):
    for experience in (make(4, 7, 1), no_groups(MAX_PROMPT, MAX_RESPONSE)):
        arrays = to_arrays(experience)
        assert_same(from_arrays(arrays), experience)
        np.savez(tmp_path / "host.npz", **arrays)  # as a checkpoint does
        with np.load(tmp_path / "host.npz", allow_pickle=False) as read:
            assert_same(from_arrays(dict(read)), experience)


def test_kept_arrays_are_flat_and_named_after_their_fields():
    assert set(to_arrays(make(4))) == {
        "prompts.tokens", "prompts.mask", "rollout.response", "rollout.response_mask", "rollout.logprobs",
        "rollout.truncated", "old_logprobs", "scores", "rewards", "iteration",
    }  # fmt: skip


def test_the_order_in_which_arrays_are_kept_does_not_matter():
    arrays = to_arrays(make(4, 7))
    assert_same(from_arrays(dict(reversed(arrays.items()))), make(4, 7))


@pytest.mark.parametrize("lost", ["prompts.mask", "rollout.truncated", "iteration"])
def test_an_array_that_is_not_there_is_missed(lost):
    arrays = to_arrays(make(4))
    del arrays[lost]
    with pytest.raises(KeyError, match=lost):
        from_arrays(arrays)


def test_nothing_kept_is_no_experience():
    with pytest.raises(KeyError):
        from_arrays({})
