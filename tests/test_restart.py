"""What a checkpoint keeps of a run between two iterations, and between two updates of one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax import build
from dgpo_jax.checkpoint import Checkpoints, peek
from dgpo_jax.collecting import Backlog, Collected, nothing_drawn
from dgpo_jax.config import fixed_settings
from dgpo_jax.restart import Progress, at_the_start, is_complete, restore, save, usable
from dgpo_jax.rl.experience import group_count
from dgpo_jax.rl.update import StepFigures, Totals
from dgpo_jax.sharding import make_mesh, to_host
from dgpo_jax.types import Experience, Prompts, Rollout

CONFIG = get_config()


@pytest.fixture(scope="module")
def parts():
    """On one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        return build.build_parts(CONFIG)


def two_groups():
    """Waiting groups of the config's shapes; no two responses are the same."""
    rng, rollout = np.random.default_rng(0), CONFIG.rollout
    responses, shape = 2 * rollout.group_size, (2 * rollout.group_size, rollout.max_response)
    prompts = rng.integers(1, 100, (2, rollout.max_prompt)).astype(np.int32)
    tokens, logprobs = rng.integers(1, 100, shape).astype(np.int32), rng.normal(size=shape).astype(np.float32)
    return Experience(
        Prompts(prompts, prompts > 50), Rollout(tokens, tokens > 50, logprobs, rng.random(responses) < 0.5),
        np.where(tokens > 50, logprobs, np.nan).astype(np.float32), rng.random(responses) < 0.5,
        rng.normal(size=responses).astype(np.float32), np.array([3, 4], np.int32),
    )  # fmt: skip


def test_a_run_begins_with_nothing_done_and_nothing_waiting():
    start = at_the_start(CONFIG, "state")
    assert (start.done, start.state, start.skipped, start.backlog.position) == (0, "state", 0, 0)
    np.testing.assert_equal(start.backlog, nothing_drawn(CONFIG))


@pytest.mark.parametrize("unwritten", [None, {"reward/mean": 0.1 + 0.2, "gap/max": float("nan"), "policy/ratio_histogram": [0.0, 1.0]}])
@pytest.mark.parametrize("waits", [False, True])
def test_what_is_saved_comes_back(waits, unwritten, parts, tmp_path):
    state, waiting = build.build_state(CONFIG, parts), two_groups() if waits else nothing_drawn(CONFIG).waiting
    progress = Progress(done=4, state=state, skipped=3, backlog=Backlog(40, waiting), unwritten=unwritten)
    record = {"settings": {"seed": 1}}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, progress, record)
        checkpoints.wait()
        restored = restore(CONFIG, parts, checkpoints)
    np.testing.assert_equal(to_host(restored.state), to_host(state))
    assert (restored.done, restored.skipped, restored.backlog.position) == (4, 3, 40)
    np.testing.assert_equal(restored.backlog, progress.backlog)
    for ours, expected in zip(jax.tree.leaves(restored.backlog.waiting), jax.tree.leaves(waiting), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
    np.testing.assert_equal(restored.unwritten, unwritten)
    iteration, extra = peek(tmp_path)
    assert (iteration, extra["position"], extra["run"]) == (4, 40, record)


def figures_of(number):
    """Of one update, no two numbers alike."""
    values = iter(np.arange(100, dtype=np.float32) + number / 8)
    sums = {"tokens": next(values), "histogram": np.array([next(values), next(values)])}
    return Totals(sums, {"ratio": next(values)}), StepFigures(next(values), next(values))


@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize("waits", [False, True])
def test_an_iteration_saved_amid_its_updates_comes_back(waits, updates, parts, tmp_path):
    state, waiting = build.build_state(CONFIG, parts), two_groups() if waits else nothing_drawn(CONFIG).waiting
    learning = two_groups()._replace(iteration=np.array([5, 5], np.int32))
    collected = Collected(learning, {"reward/mean": 0.1 + 0.2}, [figures_of(number) for number in range(updates)])
    progress = Progress(4, state, 1, Backlog(40, waiting), collected=collected)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, progress._replace(collected=None), {})
        save(checkpoints, progress, {})
        checkpoints.wait()
        restored = restore(CONFIG, parts, checkpoints)
    assert (restored.done, restored.skipped, restored.backlog.position, restored.unwritten) == (4, 1, 40, None)
    np.testing.assert_equal(restored.backlog, progress.backlog)
    assert restored.collected.metrics == collected.metrics
    ours, expected = restored.collected, collected
    assert jax.tree.structure(ours.results) == jax.tree.structure(expected.results)
    for one, other in zip(jax.tree.leaves(ours[::2]), jax.tree.leaves(expected[::2]), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype  # sums over updates are taken in it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration_000004", "iteration_000005"]


@pytest.mark.parametrize(
    "change, kept",
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"group_size": 8}, False),
        ({"max_response": 40}, False),
        ({"max_prompt": 80}, False),
        ({"prompts": 2}, False),  # they are a whole iteration's: nothing would be drawn
        ({"prompts": 1, "staleness": 2}, True),
    ],
)
def test_groups_that_waited_are_left_out_where_their_sizes_no_longer_fit(change, kept, capsys):
    settings = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, **change), update=dataclasses.replace(CONFIG.update, updates=1))
    waiting = usable(settings, two_groups())
    assert group_count(waiting) == (2 if kept else 0)
    assert ("2 groups that waited were sampled for other sizes" in capsys.readouterr().out) is not kept
    assert waiting.rollout.response.shape[1] == settings.rollout.max_response  # what is drawn can be joined to it


def test_updates_that_began_with_other_settings_do_not_go_on_even_if_the_change_is_accepted(parts, tmp_path):
    collected = Collected(two_groups(), {}, [])
    progress = Progress(4, build.build_state(CONFIG, parts), 0, nothing_drawn(CONFIG), collected=collected)
    changed = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5), checkpoint=dataclasses.replace(CONFIG.checkpoint, accept_changes="all")
    )
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, progress, {"settings": fixed_settings(CONFIG)})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"amid the updates of iteration 5, .* \(optimizer\.learning_rate\); finish it with those and --config\.iterations=5"):
            restore(changed, parts, checkpoints)
        assert restore(CONFIG, parts, checkpoints).collected is not None


@pytest.mark.parametrize(
    "found, complete",
    [
        (None, False),
        ((3, {"unwritten": None, "collected": None}), False),
        ((4, {"unwritten": None, "collected": None}), True),
        ((4, {"unwritten": {}, "collected": None}), False),  # its evaluation is missing
        ((4, {"unwritten": None, "collected": {}}), False),  # these are updates of iteration 4
        ((5, {"unwritten": None, "collected": {}}), True),
    ],
)
def test_a_run_is_complete_when_all_there_is_of_its_iterations_is_written(found, complete):
    assert is_complete(found, 4) is complete


def test_without_a_checkpoint_there_is_nothing_to_restore(parts, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert restore(CONFIG, parts, checkpoints) is None
