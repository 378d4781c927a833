"""The folder of a run: one process at a time, and only for the run it belongs to."""

import fcntl
import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_config import get_config

from dgpo_jax import train, workdir
from dgpo_jax.recipe import resolve
from dgpo_jax.session import Stopwatch
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


@pytest.mark.parametrize("names", ["", "optimizer.beta1", "rollout", "problems"])
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


def test_settings_that_may_change_but_change_rounding_are_told():
    changed = replace(CONFIG, update=replace(CONFIG.update, tokens_per_device=512), mesh=replace(CONFIG.mesh, fsdp=2))
    said = workdir.check_record(changed, workdir.run_record(CONFIG, SETS), workdir.run_record(changed, SETS), "there")
    assert said == "mesh.fsdp was 1 and is 2; update.tokens_per_device was 256 and is 512"


def test_a_setting_that_did_not_exist_then_is_no_change():
    record = workdir.run_record(CONFIG, SETS)
    record["settings"].pop("seed")
    assert workdir.check_record(CONFIG, record, workdir.run_record(CONFIG, SETS), "there") == ""


def test_what_may_change_is_not_looked_at():
    longer = replace(CONFIG, iterations=99, stop_after_minutes=5.0, grace_seconds=1.0)
    assert workdir.check_record(longer, workdir.run_record(CONFIG, SETS), workdir.run_record(longer, SETS), "there") == ""


SOLVED = SUM._replace(solution="2 + 2 = 4")
OTHERWISE = SUM._replace(solution="it is 4")


@pytest.mark.parametrize("name, refused", [
    ("sft", True),  # what is learned from
    ("training", False),  # its solution is not read
])
def test_other_solutions_are_other_problems_where_they_are_learned_from(name, refused):
    before, ours = (workdir.run_record(CONFIG, {name: [problem]}) for problem in (SOLVED, OTHERWISE))
    if refused:
        with pytest.raises(ValueError, match=r"other sft problems: they were 1 and are 1.*accept_changes=problems"):
            workdir.check_record(CONFIG, before, ours, "there")
    assert workdir.check_record(accepting("problems" if refused else ""), before, ours, "there") == ""


@pytest.mark.parametrize("config, refused", [
    (replace(CONFIG, sft=replace(CONFIG.sft, learning_rate=5e-3)), r"sft\.learning_rate was 0\.01 and is 0\.005"),
    (replace(CONFIG, seed=1), "seed was 0 and is 1"),
    (replace(CONFIG, optimizer=replace(CONFIG.optimizer, beta2=0.9)), r"optimizer\.beta2"),
    # These have no part in it, and the runs of a comparison differ in the first and share one.
    (replace(CONFIG, loss=replace(CONFIG.loss, method="reinforce")), ""),
    (with_rate(2e-3), ""),
    (replace(CONFIG, data=replace(CONFIG.data, held_out="")), ""),
])
def test_a_checkpoint_of_the_warm_start_is_for_all_runs_that_would_have_the_same(config, refused):
    before = workdir.of_warm_start(workdir.run_record(CONFIG, SETS | {"sft": [SOLVED]}))
    ours = workdir.run_record(config, {"training": [], "sft": [SOLVED]})
    if not refused:
        assert workdir.check_record(config, before, ours, "there") == ""
        return
    with pytest.raises(ValueError, match=refused):
        workdir.check_record(config, before, ours, "there")


def test_a_checkpoint_of_a_warm_start_from_before_it_had_a_record_is_taken():
    assert workdir.check_record(CONFIG, workdir.of_warm_start({}), workdir.run_record(CONFIG, SETS), "there") == ""


@pytest.fixture
def claimed(tmp_path):
    """The function (config, found) -> record of a run that starts from the files in tmp_path/model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("as it was")
    parts = SimpleNamespace(stream=SimpleNamespace(problems=[SUM]), held_out=[], benchmarks={}, folder=str(folder))
    return lambda config, found: workdir.claim_sets(config, tmp_path / "run", parts, found)


def test_other_files_of_the_model_are_refused_by_name_and_accepted_on_purpose(claimed, tmp_path):
    (tmp_path / "run").mkdir()
    config = replace(CONFIG, model=replace(CONFIG.model, path="org/name"))
    found = (3, {"run": claimed(config, None)})
    assert claimed(config, found) == found[1]["run"]
    (tmp_path / "model/chat_template.jinja").write_text("as it is")
    with pytest.raises(ValueError, match=r"other files in model\.path org/name: chat_template\.jinja changed.*accept_changes=model_files"):
        claimed(config, found)
    assert claimed(accepting("model_files", config), found) != found[1]["run"]
    old = {name: value for name, value in found[1]["run"].items() if name != "model_files"}  # from before this was recorded
    claimed(config, (3, {"run": old}))


def test_what_a_run_is_about_is_written_down_at_once_only_where_nothing_was_computed(tmp_path):
    def written():
        return json.loads((tmp_path / "config.json").read_text())["optimizer"]["learning_rate"], (tmp_path / "problems.json").read_text()

    def claim(config, problems):
        workdir.claim_workdir(config, tmp_path)
        workdir.claim_problems(config, tmp_path, workdir.fingerprints({"training": problems}))
        return workdir.run_record(config, {"training": problems})

    claim(CONFIG, [SUM])
    claim(with_rate(2e-3), [SOLVED, SUM])  # as where the first was refused for something else, and put right
    before = written()
    assert before[0] == 2e-3
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    changed = with_rate(3e-3, "all")
    record = claim(changed, [SUM])
    assert written() == before  # it may still fail
    workdir.settle(changed, tmp_path, record)
    assert written()[0] == 3e-3 and written()[1] != before[1]


@pytest.mark.parametrize("name", ["rollouts", "eval", "nonfinite", "tensorboard"])
def test_a_file_where_a_run_has_a_folder_is_refused_at_the_start(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} is not a folder, and a run has one there; move it away, or use another --workdir"):
        workdir.claim_workdir(CONFIG, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "problems.json", "metrics.jsonl", "curves.png"])
def test_a_folder_or_a_pipe_where_a_run_has_a_file_is_refused_at_the_start(tmp_path, name, pipe):
    for make in (pipe, lambda path: path.mkdir()):
        path = tmp_path / make.__name__ / name
        path.parent.mkdir()
        make(path)
        with pytest.raises(ValueError, match=f"{name} is not a regular file, and a run has one there; move it away"):
            workdir.claim_workdir(CONFIG, path.parent)


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path, pipe):
    pipe(tmp_path / "lock")
    with ExitStack() as stack, pytest.raises(ValueError, match="cannot be written: Not a regular file; choose another"):
        workdir.claim(stack, CONFIG, tmp_path)


@pytest.mark.parametrize("best_by, done, best, refused", [
    ("", 0, None, False),
    ("eval/greedy", 0, None, False),
    ("eval/gredy", 0, None, True),
    ("eval/gredy", 4, 0.5, True),  # of a run that went on with it
    ("reward/mean", 0, None, False),  # there is none before the first iteration
    ("reward/mean", 1, None, False),
    ("reward/men", 1, None, True),
    ("optim/now_and_then", 9, 0.5, False),  # it was there, or nothing would have been kept
])  # fmt: skip
def test_a_best_by_that_no_evaluation_has_is_refused_with_those_that_there_are(best_by, done, best, refused):
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, best_by=best_by))
    scores, metrics = {"eval/greedy": 0.5, "eval/greedy_length": 9.0, "eval/avg@2": 0.25}, {"reward/mean": 0.1} if done else {}
    written = []
    run = SimpleNamespace(
        config=config, checkpoints=SimpleNamespace(best_score=lambda: best), stopping=SimpleNamespace(evaluation=lambda: None),
        stopwatch=Stopwatch(show=lambda part: None), evaluate=lambda _: (scores, []), decode_params=lambda params: params,
        writer=SimpleNamespace(write=lambda *line: written.append(line)),
    )  # fmt: skip

    def evaluate():
        train.evaluation(run, SimpleNamespace(done=done, state=SimpleNamespace(params={})), metrics, due=True)

    if refused:
        with pytest.raises(ValueError, match=rf"checkpoint.best_by is '{best_by}', .* choose one of eval/greedy, eval/avg@2\."):
            evaluate()
    else:
        evaluate()
    assert len(written) == (not refused)
