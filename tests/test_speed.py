"""Tokens, model FLOPs and utilisation of an iteration."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax.config import KlConfig
from dgpo_jax.hardware import chip_of
from dgpo_jax.models.flops import rollout_flops, training_flops
from dgpo_jax.recipe import resolve
from dgpo_jax.speed import find_peak, rollout_work, speed_metrics, update_work
from dgpo_jax.types import Experience, Prompts, Rollout

CONFIG = resolve(get_config())
METRICS = {
    "rollout/tokens": 600.0, "rollout/tflop": 3.0, "time/rollout": 2.0,
    "update/tokens": 1000.0, "update/tflop": 20.0, "time/update": 5.0,
}  # fmt: skip


def parts_on(device_kind, devices=2):
    device = SimpleNamespace(device_kind=device_kind, num_cores=1)
    mesh = SimpleNamespace(size=devices, devices=np.array([device] * devices, object))
    return SimpleNamespace(mesh=mesh, model=SimpleNamespace(config=CONFIG.model))


def experience(prompts, responses):
    """Of these lengths; the prompts padded on the left."""
    slots, most = max(prompts), max(responses)
    mask = np.arange(slots) >= slots - np.array(prompts)[:, None]
    taken = np.arange(most) < np.array(responses)[:, None]
    nothing = np.zeros(len(responses), np.float32)
    return Experience(
        Prompts(mask.astype(np.int32), mask), Rollout(taken.astype(np.int32), taken, taken.astype(np.float32), nothing.astype(bool)),
        taken.astype(np.float32), nothing, nothing, np.ones(len(prompts), np.int32),
    )  # fmt: skip


def test_rates_are_per_second_and_device():
    found = speed_metrics(CONFIG, parts_on("TPU v5 lite"), METRICS)
    assert found["speed/rollout_tokens_per_second_per_device"] == 150.0  # 600 in 2 s on 2 devices
    assert found["speed/update_tokens_per_second_per_device"] == 100.0
    assert found["speed/rollout_tflops_per_device"] == 0.75
    assert found["speed/update_tflops_per_device"] == 2.0
    assert found["speed/rollout_mfu"] == 0.75 / 197
    assert found["speed/update_mfu"] == 2.0 / 197


def test_without_a_known_peak_there_is_no_utilisation():
    found = speed_metrics(CONFIG, parts_on("cpu"), METRICS)
    assert [name for name in found if name.endswith("mfu")] == []
    assert found["speed/update_tflops_per_device"] == 2.0


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v5 lite"])
def test_a_peak_that_was_measured_wins_over_the_table(device_kind):
    config = replace(CONFIG, peak_tflops=4.0)
    assert speed_metrics(config, parts_on(device_kind), METRICS)["speed/update_mfu"] == 0.5


def test_the_peak_of_a_device_that_is_half_a_chip_is_half():
    assert find_peak(CONFIG, parts_on("TPU7x")) == chip_of("TPU7x").flops / 2e12


def test_all_draws_of_an_iteration_are_work():
    draws = [experience([3, 2], [4, 1, 2, 2]), experience([5, 1], [1, 1, 3, 3])]
    expected = sum(rollout_flops(CONFIG.model, *lengths) for lengths in (([3, 2], [4, 1, 2, 2]), ([5, 1], [1, 1, 3, 3])))
    assert rollout_work(parts_on("cpu"), draws) == {"rollout/tflop": expected / 1e12}
    assert expected > 0


@pytest.mark.parametrize("changes, scorings", [
    ({}, 1),  # with the weights that sampled
    ({"update": replace(CONFIG.update, old_logprobs="sampler")}, 0),
    ({"update": replace(CONFIG.update, old_logprobs="sampler"), "kl": KlConfig(coefficient=0.1)}, 1),  # by the reference
])
def test_learning_counts_the_responses_with_an_advantage_and_the_scorings_asked_for(changes, scorings):
    config = replace(CONFIG, **changes)
    advantages = np.array([[1, -1], [0, 0]], np.float32)
    computed = slice(0, 2) if not config.kl.in_loss else slice(0, 4)  # a KL learns from all of them
    prompts, responses = np.array([3, 3, 2, 2])[computed], np.array([4, 1, 2, 6])[computed]
    work = update_work(config, parts_on("cpu"), experience([3, 2], [4, 1, 2, 6]), advantages)
    assert work["update/tokens"] == prompts.sum() + responses.sum()
    assert work["update/tflop"] == training_flops(config.model, prompts, responses, scorings) / 1e12


def test_an_iteration_with_nothing_to_learn_is_no_work_and_no_error():
    work = update_work(CONFIG, parts_on("cpu"), experience([3, 2], [4, 1, 2, 6]), np.zeros((2, 2), np.float32))
    assert work == {"update/tokens": 0.0, "update/tflop": 0.0}
    found = speed_metrics(CONFIG, parts_on("TPU v4"), METRICS | work)
    assert found["speed/update_mfu"] == 0.0


