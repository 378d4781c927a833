"""The folder of a run: one process at a time, and only for the run it belongs to."""

import fcntl
from contextlib import ExitStack
from dataclasses import replace

import pytest
from tiny_config import get_config

from dgpo_jax import train, workdir
from dgpo_jax.recipe import resolve
from dgpo_jax.types import Problem

CONFIG = resolve(get_config())
SUM = Problem("1", "2 + 2?", "4", "test")
SETS = {"training": [SUM], "held_out": []}


def accepting(names, config=CONFIG):
    """The config with checkpoint.accept_changes."""
    return replace(config, checkpoint=replace(config.checkpoint, accept_changes=names))


def with_rate(rate, names=""):
    return accepting(names, replace(CONFIG, optimizer=replace(CONFIG.optimizer, learning_rate=rate)))


def test_a_workdir_that_another_process_works_in_is_refused_before_anything_is_computed(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being worked on by another process; wait for it, or stop it"):
            train.train(CONFIG, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_a_claim_lasts_as_long_as_its_stack(tmp_path):
    for _ in range(2):
        with ExitStack() as stack:
            assert workdir.claim(stack, CONFIG, tmp_path) is None


@pytest.mark.parametrize("names", ["optimizer.learning_rate", "seed, optimizer.learning_rate", "optimizer", "all"])
def test_a_changed_setting_is_accepted_by_its_name_its_group_or_all(names):
    record = workdir.run_record(CONFIG, SETS)
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.001 and is 0.002.*accept_changes=optimizer.learning_rate"):
        workdir.check_record(with_rate(2e-3), record, workdir.run_record(with_rate(2e-3), SETS), "there")
    changed = with_rate(2e-3, names)
    assert workdir.check_record(changed, record, workdir.run_record(changed, SETS), "there") == ""


@pytest.mark.parametrize("names", ["", "optimizer.learning_rat", "rollout", "problems"])
def test_other_names_accept_nothing(names):
    changed = with_rate(2e-3, names)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.001 and is 0\.002"):
        workdir.check_record(changed, workdir.run_record(CONFIG, SETS), workdir.run_record(changed, SETS), "there")


@pytest.mark.parametrize("problems", [[SUM._replace(answer="5")], [SUM, SUM], []])
def test_other_problems_are_refused_and_accepted_by_name(problems):
    ours = workdir.run_record(CONFIG, SETS | {"training": problems})
    with pytest.raises(ValueError, match=r"other training problems.*accept_changes=problems"):
        workdir.check_record(CONFIG, workdir.run_record(CONFIG, SETS), ours, "there")
    assert workdir.check_record(accepting("problems"), workdir.run_record(CONFIG, SETS), ours, "there") == ""


def test_another_machine_is_told_and_not_refused():
    record = workdir.run_record(CONFIG, SETS)
    before = record | {"environment": record["environment"] | {"devices": 64, "jaxlib": "0.0.1"}}
    said = workdir.check_record(CONFIG, before, record, "there")
    assert "devices was 64 and is 8" in said and "jaxlib was 0.0.1" in said


def test_a_setting_that_did_not_exist_then_is_no_change():
    record = workdir.run_record(CONFIG, SETS)
    record["settings"].pop("seed")
    assert workdir.check_record(CONFIG, record, workdir.run_record(CONFIG, SETS), "there") == ""


def test_what_may_change_is_not_looked_at():
    longer = replace(CONFIG, iterations=99, stop_after_minutes=5.0, grace_seconds=1.0)
    assert workdir.check_record(longer, workdir.run_record(CONFIG, SETS), workdir.run_record(longer, SETS), "there") == ""
