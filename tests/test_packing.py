"""Packing: every token lands once, where its mask, segment and position say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_jax.rl.packing import (
    Example,
    Place,
    Shape,
    best_fit,
    deal,
    empty_batch,
    fill,
    lay_out,
    pack,
    packing_metrics,
    split_groups,
    spread_out,
    to_examples,
    unpack,
)
from dgpo_jax.types import Experience, Prompts, Rollout

PER_RESPONSE = ("advantages", "weights", "supervised")  # fields of a batch that an Example gives as one number


def example(prompt, response, advantage=1.0, weight=0.5, supervised=0.25):
    """Log-probabilities are minus the token, or minus ten times it, so that a test can see which token they came with."""
    response = np.array(response, np.int32)
    numbers = response.astype(np.float32)
    return Example(np.array(prompt, np.int32), response, -numbers, -10 * numbers, advantage, weight, supervised)


@pytest.mark.parametrize("lengths, expected", [
    ([], []),
    ([5], [0]),  # exactly full
    ([2, 3], [0, 0]),  # the longest first; the other still fits behind it
    ([3, 3], [0, 1]),
    ([1, 4, 2, 3], [0, 0, 1, 1]),  # by length 4, 3, 2, 1: the 3 in a row of its own, 2 behind it, 1 behind the 4
    ([3, 4, 1], [1, 0, 0]),  # the 1 fits behind both, and the 4 leaves less room
    ([2, 2, 2], [0, 0, 1]),  # equal lengths keep their order
])
def test_the_longest_is_placed_first_into_the_fullest_row_with_room(lengths, expected):
    assert best_fit(np.array(lengths, int), 5).tolist() == expected


def test_a_sequence_longer_than_a_row_is_refused_with_the_setting_that_helps():
    with pytest.raises(ValueError, match=r"6 tokens does not fit a row of 5; raise update\.tokens_per_row"):
        best_fit(np.array([2, 6]), 5)
    with pytest.raises(ValueError, match="6 tokens"):
        pack([example([1, 2, 3], [4, 5, 6])], rows=1, tokens_per_row=5)


@pytest.mark.parametrize("lengths, cost, rows, expected", [
    ([3, 3, 2, 2], [9, 9, 4, 4], 2, [0, 1, 0, 1]),  # 13 each
    ([4, 1, 1], [16, 1, 1], 2, [0, 1, 1]),  # 16 and 2: the others do not join the one that costs most
    ([2, 3, 5], [1, 9, 1], 2, [0, 0, 1]),  # cost 1 twice: the longer first, into the empty row; then row 0 is the only one with room
    ([3, 3, 3], [1, 1, 1], 2, None),  # does not fit
    ([], [], 0, []),
])
def test_the_costliest_is_placed_first_where_least_is_to_be_done(lengths, cost, rows, expected):
    found = spread_out(np.array(lengths, int), np.array(cost, float), rows, 5)
    assert found is expected if expected is None else found.tolist() == expected


def test_rows_are_dealt_to_the_devices_to_and_fro():
    # Two microbatches of four rows on two devices; the costliest four rows, 0 to 3 here, make the first. Device 0 has
    # rows 0 and 1 of it: the costliest and the fourth, so that 8 + 5 = 7 + 6.
    assert deal(np.array([8, 7, 6, 5, 4, 3, 2, 1.0]), rows=4, devices=2).tolist() == [0, 2, 3, 1, 4, 6, 7, 5]
    # The order that rows come in does not matter.
    assert deal(np.array([1, 8, 2, 7.0]), rows=4, devices=4).tolist() == [3, 0, 2, 1]
    assert deal(np.zeros(0), rows=4, devices=2).tolist() == []


def test_a_packed_row_by_hand():
    # The longer sequence (4) comes first, the other (3) behind it, one slot is left.
    short = example([7], [8, 9], advantage=-0.5, weight=0.125, supervised=0.0)
    long = example([1, 2], [3, 4], advantage=2.0, weight=0.25, supervised=0.75)
    # Both in the first row of two: laid out for one, and then filled into a microbatch of two.
    one = lay_out([short, long], Shape(1, 8))
    (batch,) = fill([short, long], one._replace(shape=Shape(2, 8)), pad_id=99)
    np.testing.assert_array_equal(batch.tokens[0], [1, 2, 3, 4, 7, 8, 9, 99])
    np.testing.assert_array_equal(batch.segment[0], [1, 1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_array_equal(batch.position[0], [0, 1, 2, 3, 0, 1, 2, 0])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(batch.sampler_logprobs[0], [0, 0, -3, -4, 0, -8, -9, 0])
    np.testing.assert_array_equal(batch.old_logprobs[0], [0, 0, -30, -40, 0, -80, -90, 0])
    np.testing.assert_array_equal(batch.advantages[0], [0, 0, 2, 2, 0, -0.5, -0.5, 0])
    np.testing.assert_array_equal(batch.weights[0], [0, 0, 0.25, 0.25, 0, 0.125, 0.125, 0])
    np.testing.assert_array_equal(batch.supervised[0], [0, 0, 0.75, 0.75, 0, 0, 0, 0])
    assert not batch.ref_logprobs.any()  # for the device to fill in
    for filled, empty in zip(batch, empty_batch(2, 8, 99), strict=True):
        np.testing.assert_array_equal(filled[1], empty[1])
        assert filled.dtype == empty.dtype and filled.shape == (2, 8)


def test_an_empty_batch_has_every_field_in_its_dtype():
    dtypes = {name: array.dtype for name, array in empty_batch(1, 4)._asdict().items()}
    integers = dict.fromkeys(("tokens", "segment", "position"), np.int32)
    floats = ("sampler_logprobs", "old_logprobs", "ref_logprobs", *PER_RESPONSE)
    assert dtypes == integers | {"loss_mask": bool} | dict.fromkeys(floats, np.float32)


def test_a_number_stands_for_every_token_also_of_log_probabilities():
    # As the warm start gives them, which has no sampler; NaN is one that the trainer has yet to compute.
    (batch,) = pack([example([1], [2, 3])._replace(sampler_logprobs=0.0, old_logprobs=np.nan)], rows=1, tokens_per_row=4)
    np.testing.assert_array_equal(batch.sampler_logprobs, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.old_logprobs, [[0, np.nan, np.nan, 0]])


def of_lengths(*lengths):
    """Examples of one prompt token and so many tokens in all."""
    return [example([1], [2] * (length - 1)) for length in lengths]


def test_places_by_hand():
    # Rows of 5, two a microbatch. Three rows hold all (5, 4 + 1, 3 + 2), so there are four; by cost, which is the number of
    # response tokens: 4, 3, 2, 1, 0 go to rows 0, 1, 2, 3, and the last behind the 1. Rows of like cost share a microbatch.
    layout = lay_out(of_lengths(3, 1, 5, 2, 4), Shape(2, 5))
    assert layout.places == [
        Place(batch=1, row=0, segment=1, start=0),
        Place(batch=1, row=1, segment=2, start=2),
        Place(batch=0, row=0, segment=1, start=0),
        Place(batch=1, row=1, segment=1, start=0),
        Place(batch=0, row=1, segment=1, start=0),
    ]
    assert (layout.batches, layout.tokens, layout.slots) == (2, 15, 20)
    np.testing.assert_array_equal(layout.costs, [[4 + 3], [2 + 1]])
    nothing = lay_out([], Shape(2, 5))
    assert (nothing.places, nothing.batches, nothing.tokens, nothing.slots) == ([], 0, 0, 0)


def test_full_rows_are_packed_as_tightly_as_without_the_devices():
    # 3 + 2 twice fills two rows of 5 to the last slot; spread by cost the 3s would share a row, which they do not fit.
    layout = lay_out(of_lengths(2, 3, 2, 3), Shape(2, 5, devices=2))
    assert layout.batches == 1 and layout.tokens == layout.slots
    np.testing.assert_array_equal(layout.costs, [[3, 3]])


def test_attention_costs_the_square_of_a_sequence():
    # One of 8 tokens and four of 4 in two rows of 16: by tokens 8 and 16, by squares 64 and 64.
    layout = lay_out(of_lengths(8, 4, 4, 4, 4), Shape(2, 16, devices=2, attention=1e6))
    assert [place.row for place in layout.places] == [1, 0, 0, 0, 0]
    np.testing.assert_array_equal(layout.costs, [[64e6 + 12, 64e6 + 7]])
    # Without attention only response tokens count, 7 and 3 each: 7 + 3 and 9.
    layout = lay_out(of_lengths(8, 4, 4, 4, 4), Shape(2, 16, devices=2))
    np.testing.assert_array_equal(np.sort(layout.costs), [[9, 10]])


def test_efficiency_is_the_share_of_slots_in_use_and_imbalance_what_the_others_wait_for_the_slowest():
    layouts = [lay_out(of_lengths(5, 3), Shape(2, 5, devices=2)), lay_out(of_lengths(3, 3, 3), Shape(2, 5, devices=2))]
    # Costs 4 and 2; then 2 and 2, and 2 and nothing: the slowest need 4 + 2 + 2, and all on average 3 + 2 + 1.
    assert packing_metrics(layouts) == {
        "update/packing_efficiency": (8 + 9) / (10 + 20), "update/imbalance": pytest.approx(8 / 6)
    }  # fmt: skip
    nothing = lay_out([], Shape(2, 5, devices=2))
    assert packing_metrics([nothing]) == {}
    assert packing_metrics([nothing, layouts[0]])["update/packing_efficiency"] == 0.8


def test_only_the_microbatches_that_are_asked_for_are_filled(monkeypatch):
    examples = of_lengths(*[4] * 6)
    made = []
    monkeypatch.setattr("dgpo_jax.rl.packing.empty_batch", lambda *arguments: made.append(1) or empty_batch(*arguments))
    batches = fill(examples, lay_out(examples, Shape(2, 4)))
    next(batches)
    assert len(made) == 1 and len([*batches]) == 2


def test_no_examples_make_no_microbatch():
    assert pack([], rows=2, tokens_per_row=8) == []
    assert unpack([], [], lay_out([], Shape(2, 8))) == []


def test_rows_beyond_one_microbatch_go_to_the_next_and_the_last_is_filled_up():
    batches = pack([example([1], [2] * 3)] * 5, rows=2, tokens_per_row=4)
    assert [int(batch.segment.any(axis=1).sum()) for batch in batches] == [2, 2, 1]
    assert {batch.tokens.shape for batch in batches} == {(2, 4)}


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([(1, 1), (3, 1), (4, 2), (4, 4)]), st.integers(13, 20), st.sampled_from([0, 1]))
def test_every_token_lands_exactly_once(lengths, rows_and_devices, tokens_per_row, attention):
    rows, devices = rows_and_devices
    next_token, examples = 1, []
    for prompt, response in lengths:  # every token of the whole batch is another number, the padding 0
        numbers = np.arange(next_token, next_token + prompt + response)
        place = len(examples) + 1.0
        examples.append(example(numbers[:prompt], numbers[prompt:], place, weight=place / 2, supervised=place / 4))
        next_token += prompt + response
    layout = lay_out(examples, Shape(rows, tokens_per_row, devices, attention))
    batches = list(fill(examples, layout))
    assert len(batches) == layout.batches and sum(np.sum(batch.segment > 0) for batch in batches) == layout.tokens
    check_costs(layout, batches)
    found = []
    for batch in batches:
        assert batch.tokens.shape == (rows, tokens_per_row)
        np.testing.assert_array_equal(batch.segment == 0, batch.tokens == 0)
        for row in range(rows):
            for segment in range(1, batch.segment[row].max() + 1):
                found.append(read_segment(batch, row, segment))
    assert len(found) == len(examples)
    for got, original in zip(sorted(found, key=lambda part: part.prompt[0]), examples, strict=True):
        for ours, expected in zip(got, original, strict=True):
            np.testing.assert_array_equal(ours, expected)


def check_costs(layout, batches):
    """Against the arrays: of each device, response tokens, and the squares of its segments where attention counts."""
    for costs, batch in zip(layout.costs, batches, strict=True):
        for cost, mask, segment in zip(
            costs, *(np.split(x, layout.shape.devices) for x in (batch.loss_mask, batch.segment)), strict=True
        ):
            squares = sum(np.sum(np.bincount(row)[1:] ** 2) for row in segment)
            assert cost == mask.sum() + layout.shape.attention * squares


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 4), st.integers(1, 2))
def test_there_are_no_more_microbatches_than_rows_packed_tightly_ask_for(lengths, rows, devices):
    rows *= devices
    layout = lay_out([example([1], [2] * length) for length in lengths], Shape(rows, 24, devices))
    tight = best_fit(np.array(lengths, int) + 1, 24)
    assert layout.batches == -(-(tight.max(initial=-1) + 1) // rows)
    # Two rows that are half empty would have been one: so tight is at most twice the fewest possible.
    assert tight.max(initial=-1) + 1 <= max(1, 2 * -(-layout.tokens // 24))
    again = lay_out([example([1], [2] * length) for length in lengths], Shape(rows, 24, devices))
    assert again.places == layout.places


def read_segment(batch, row, segment):
    """The Example in one segment, read back by the masks alone; checks that positions count from 0 without a gap."""
    slots = np.flatnonzero(batch.segment[row] == segment)
    np.testing.assert_array_equal(slots, np.arange(slots[0], slots[0] + len(slots)))
    np.testing.assert_array_equal(batch.position[row, slots], np.arange(len(slots)))
    learned = slots[batch.loss_mask[row, slots]]
    prompt = slots[~batch.loss_mask[row, slots]]
    assert prompt.max() < learned.min()
    numbers = [set(getattr(batch, name)[row, learned].tolist()) for name in PER_RESPONSE]
    assert [len(values) for values in numbers] == [1, 1, 1]  # the same at every token
    return Example(
        batch.tokens[row, prompt], batch.tokens[row, learned], batch.sampler_logprobs[row, learned],
        batch.old_logprobs[row, learned], *(values.pop() for values in numbers),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(13, 20))
def test_unpack_gives_back_what_pack_put_there(lengths, rows, tokens_per_row):
    # Every array of the batch, read back in the order of the examples, whatever rows they went to.
    examples = [
        example(range(100, 100 + prompt), range(10 * number, 10 * number + response), advantage=float(number))
        for number, (prompt, response) in enumerate(lengths, start=1)
    ]
    layout = lay_out(examples, Shape(rows, tokens_per_row))
    batches = list(fill(examples, layout))
    for field, of_example in (("tokens", "response"), ("sampler_logprobs", "sampler_logprobs"), ("old_logprobs", "old_logprobs")):
        found = unpack([getattr(batch, field) for batch in batches], examples, layout)
        assert len(found) == len(examples)
        for ours, original in zip(found, examples, strict=True):
            np.testing.assert_array_equal(ours, getattr(original, of_example))
    for ours, original in zip(unpack([batch.advantages for batch in batches], examples, layout), examples, strict=True):
        np.testing.assert_array_equal(ours, [original.advantage] * len(original.response))


def make_experience():
    """Two groups of two; 9 is the stop token, and the old log-probabilities of the second group are yet to be computed."""
    prompts = Prompts(np.array([[0, 5], [6, 7]], np.int32), np.array([[False, True], [True, True]]))
    rollout = Rollout(
        response=np.array([[1, 2, 3], [9, 0, 0], [4, 9, 0], [8, 8, 9]], np.int32),
        response_mask=np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], bool),
        logprobs=-np.arange(12, dtype=np.float32).reshape(4, 3),
        truncated=np.array([True, False, False, False]),
    )
    old_logprobs = np.where([[True], [True], [False], [False]], 10 * rollout.logprobs, np.nan).astype(np.float32)
    correct, rewards = np.array([True, False, False, False]), np.array([1, 0, 0, 0], np.float32)
    return Experience(prompts, rollout, old_logprobs, correct, rewards, np.array([1, 1], np.int32))


def test_the_padding_of_a_rollout_is_cut_off():
    advantages, weights, supervised = ([scale * row for row in range(4)] for scale in (0.5, 0.25, 0.125))
    first, second = to_examples(make_experience(), [1, 2], advantages, weights, supervised)
    # Row 1 is sample 1 of prompt 0: the stop token came first, so that the response is that token alone.
    np.testing.assert_array_equal(np.concatenate([first.prompt, first.response]), [5, 9])
    np.testing.assert_array_equal(first.sampler_logprobs, [-3])
    np.testing.assert_array_equal(first.old_logprobs, [-30])
    assert first[4:] == (0.5, 0.25, 0.125)
    # Row 2 is sample 0 of prompt 1.
    np.testing.assert_array_equal(np.concatenate([second.prompt, second.response]), [6, 7, 4, 9])
    np.testing.assert_array_equal(second.sampler_logprobs, [-6, -7])
    np.testing.assert_array_equal(second.old_logprobs, [np.nan, np.nan])
    assert second[4:] == (1.0, 0.5, 0.25)


def test_examples_come_in_the_order_asked_for():
    numbers = np.arange(4.0)
    examples = to_examples(make_experience(), [3, 0, 2], numbers, numbers, numbers)
    assert [one.advantage for one in examples] == [3, 0, 2]
    assert to_examples(make_experience(), [], numbers, numbers, numbers) == []


def test_a_response_of_one_token_is_learned_from():
    (batch,) = pack([example([5], [9])], rows=1, tokens_per_row=4)
    np.testing.assert_array_equal(batch.loss_mask, [[False, True, False, False]])


def test_groups_are_split_evenly_and_each_is_used_once():
    split = split_groups(12, 3, seed=0, iteration=1)
    assert split.shape == (3, 4)
    assert sorted(split.reshape(-1).tolist()) == list(range(12))


def test_the_split_depends_on_seed_and_iteration_and_nothing_else():
    first = split_groups(12, 3, seed=0, iteration=1)
    np.testing.assert_array_equal(split_groups(12, 3, seed=0, iteration=1), first)
    assert (split_groups(12, 3, seed=0, iteration=2) != first).any()
    assert (split_groups(12, 3, seed=1, iteration=1) != first).any()
    # The order is the same however many updates it is cut into.
    np.testing.assert_array_equal(split_groups(12, 1, seed=0, iteration=1).reshape(3, 4), first)


def test_groups_that_do_not_divide_into_the_updates_are_refused():
    with pytest.raises(ValueError):
        split_groups(10, 3, seed=0, iteration=1)
