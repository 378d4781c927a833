"""What a person can get wrong: one short message that says what and how to mend it, no traceback, before anything is computed.

A few commands run as processes of their own. The others go through the same `run_command` in this process, where
anything but a SystemExit fails the test just as a traceback would.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpo_jax import session, sft, train, workdir
from dgpo_jax.config import load
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.models.hf import SINGLE
from dgpo_jax.recipe import resolve
from dgpo_jax.types import Problem

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_config.py'}"
LINES = 15  # a message this long is still read
CHEAP = ("--config.sft.updates=0", "--config.data.held_out=")  # no need to get that far


def plain(message):
    """A message without the box around it and the line ends inside it."""
    return " ".join("".join(" " if letter in "╭─╮│╰╯" else letter for letter in message).split())


def run_module(module, *arguments):
    """The command as a person types it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def refuse(monkeypatch, capfd, tmp_path):
    """The function (arguments, module) -> the message with which the command is refused."""
    monkeypatch.setattr(session, "use_compilation_cache", lambda: None)  # a setting of the whole process
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DGPO_JAX_TRACEBACK", raising=False)

    def refuse(*arguments, module=train):
        story = {train: train.train, sft: sft.sft}[module]
        if not any(argument.startswith("--workdir") for argument in arguments):
            arguments = (*arguments, f"--workdir={tmp_path / 'run'}")
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        with pytest.raises(SystemExit) as stop:
            session.run_command(module.__name__, "", story)
        assert stop.value.code in (1, 2)
        error = capfd.readouterr().err
        assert "Traceback" not in error and len(error.splitlines()) <= LINES
        assert not list(tmp_path.glob("run/metrics.jsonl"))  # before the first iteration
        return plain(error)

    return refuse


@pytest.mark.parametrize("module, arguments, expected", [
    ("dgpo_jax.train", [TINY, "--config.loss.clp_low=0.1"], ["--config.loss.clp_low", "--config.loss.clip-low"]),
    ("dgpo_jax.sft", [TINY, "--config.rollout.group_size=1"], ["rollout.group_size is 1", "at least 2"]),
    ("dgpo_jax.prepare", [TINY], ["--output is ''", "--output=prepared.jsonl"]),
    ("dgpo_jax.evaluate", [TINY, "--config.eval.sets=mine=README.md"], ["mine: source 'README.md' is not", ".jsonl"]),
])  # fmt: skip
def test_a_command_with_bad_input_ends_with_a_short_message_and_a_code(module, arguments, expected):
    ended = run_module(module, *arguments)
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= LINES
    for text in expected:
        assert text in plain(ended.stderr)


@pytest.mark.parametrize("arguments, expected", [
    (["--config=configs/smok.py"], ["configs/smok.py", "configs/smoke.py"]),
    ([TINY, "--workdir=README.md/run"], ["README.md/run", "choose another"]),  # below a file
])  # fmt: skip
def test_a_path_that_cannot_be_is_refused(arguments, expected, refuse, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refuse(*arguments)
    for text in expected:
        assert text in message


def test_help_lists_the_settings_with_their_comments(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as stop:
        session.run_command("dgpo_jax.train", "", lambda *_: pytest.fail("the story was begun"))
    printed = capfd.readouterr()
    assert stop.value.code == 0 and not printed.err
    text = plain(printed.out)
    for setting in ("--workdir", "--config.seed", "--config.rollout.group-size", "--config.checkpoint.keep"):
        assert setting in text
    assert "G, responses per prompt (default: 8)" in text
    assert "AdamW with warm-up and gradient clipping." in text


@pytest.mark.parametrize("argument, expected", [
    ("--config.seed=abc", ["--config.seed", "'abc'"]),
    ("--config.optimizer.learning_rate=fast", ["--config.optimizer.learning-rate", "fast"]),
    ("--config.loss.method=ppo", ["'ppo'", "'dgpo'"]),
    ("--config.update.updates=3", ["update.updates is 3", "8 groups"]),
    ("--config.seed", ["--config.seed"]),  # no value at all
    ("--config.kl.estimator=k1", ["kl.estimator is 'k1'", "use k2 or k3, or kl.place=reward"]),
    ("--config.kl.place=rewards", ["'rewards'", "'loss', 'reward'"]),
    ("--config.correction.low=2", ["correction.low", "around 1"]),
    ("--config.loss.clip_low=-0.1", ["loss.clip_low is -0.1", "0 or more; 1 = no lower bound"]),
    ("--config.reward.incorrect=1", ["reward.incorrect is 1.0", "reward.correct is 1.0; lower it"]),
    ("--config.reward.no_think_end=nan", ["reward.no_think_end is nan", "lower it"]),
    ("--config.reward.correct=0", ["reward.incorrect is 0.0", "reward.correct is 0.0"]),  # which is DGPO's
    ("--config.loss.dual_clip=1.25", ["loss.dual_clip is 1.25", "raise it above 1 + clip_high"]),  # which is DGPO's 0.28
    ("--config.reward.overlong_buffer=13", ["reward.overlong_buffer is 13", "at most 12 tokens"]),
    ("--config.rollout.staleness=-1", ["rollout.staleness is -1", "0 to learn at once"]),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(argument, expected, refuse):
    message = refuse(TINY, argument)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("arguments, expected", [
    (["--config.kl.estimator=k1", "--config.kl.place=reward", "--config.kl.coefficient=-1"], ["kl.coefficient is -1.0", "0 for off"]),
    (["--config.update.old_logprobs=sampler", "--config.correction.weights=token"], ["update.old_logprobs is 'sampler'", "use trainer"]),
    (["--config.loss.method=grpo", "--config.loss.dual_clip=1.2"], ["loss.dual_clip is 1.2"]),
    (["--config.loss.method=gspo", "--config.correction.weights=token"], ["gspo takes a sequence as one", "use sequence or geometric"]),
    (["--config.loss.method=gmpo", "--config.correction.reject=token"], ["gmpo takes a sequence as one", "use sequence or geometric"]),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(arguments, expected, refuse):
    message = refuse(TINY, *arguments)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("arguments, expected", [
    (["--config.mesh.fsdp=3"], ["fsdp=3", "8 devices"]),
    (["--config.mesh.data=2"], ["data=2", "needs 2 devices and there are 8"]),
    # Two key heads cannot be split over four devices.
    (["--config.mesh.data=2", "--config.mesh.tensor=4"], ["key_heads", "lower mesh.tensor"]),
])  # fmt: skip
def test_devices_that_do_not_divide_are_refused(arguments, expected, refuse):
    message = refuse(TINY, *arguments)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("arguments, expected", [
    (["--config.model.vocab_size=100"], ["model.vocab_size is 100", "builtin:words"]),
    (["--config.data.tokenizer="], ["data.tokenizer is empty", "builtin:words"]),
    (["--config.data.tokenizer=nowhere"], ["nowhere", "no such folder"]),
    (["--config.data.train=generated:arithmetik/train"], ["arithmetik", "arithmetic"]),
    (["--config.data.train=problems.csv"], ["problems.csv", ".jsonl"]),
    (["--config.data.train=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    (["--config.data.template=Question: "], ["Question", "{problem}"]),
    (["--config.data.operations=ad"], ["'ad'", "add"]),
    (["--config.rollout.max_prompt=8"], ["more than max_prompt 8", "raise max_prompt"]),
    (["--config.rollout.max_prompt=3", "--config.data.too_long=drop"], ["all 200 problems", "raise max_prompt"]),
    (["--config.rollout.max_prompt=1", "--config.data.too_long=cut"], ["leaves no room", "raise max_prompt"]),
    (["--config.data.train= + "], ["names nothing", "generated:KIND/SPLIT"]),
    ([f"--config.data.train={'x' * 300}.jsonl"], ["cannot be read", "name too long"]),
])  # fmt: skip
def test_problems_and_a_tokenizer_that_do_not_fit_are_refused(arguments, expected, refuse):
    message = refuse(TINY, *arguments)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("lines, expected", [
    ("", ["holds no problem"]),
    ("\n\n", ["holds no problem"]),
    ('{"problem": "2+2?"}\n', ["problems.jsonl:1", "'answer'"]),
    ('{"problem": "2+2?", "answer": "4"}\n{"problem": "3+3?", "answer": ""}\n', ["problems.jsonl:2", "answer"]),
    ('{"problem": "2+2?", "anwser": "4"}\n', ["'anwser'", "set the field's name"]),
    ('{"problem": "2+2?", "answer": "4"\n', ["problems.jsonl:1", "not JSON"]),
    ('{"problem": "2+2?", "answer": ' + "4" * 5000 + "}\n", ["problems.jsonl:1", "4300 digits", "correct or delete the line"]),
    ('{"problem": "2+2?", "answer": "4", "answer": "5"}\n', ['problems.jsonl:1: "answer" is there twice']),
    ('{"problem": "2+2?", "answer": "4", "id": "a\\nb"}\n', ["problems.jsonl:1", "printable characters"]),
])  # fmt: skip
def test_data_without_problems_or_answers_is_refused_by_file_and_line(lines, expected, refuse, tmp_path):
    (tmp_path / "problems.jsonl").write_text(lines)
    message = refuse(TINY, f"--config.data.train={tmp_path / 'problems.jsonl'}")
    for text in expected:
        assert text in message


def test_a_model_folder_that_is_not_there_is_refused(refuse, tmp_path):
    message = refuse(TINY, f"--config.model.path={tmp_path / 'nowhere'}")
    assert "model.path" in message and "nowhere" in message and "give an existing folder" in message


def model_folder(tmp_path):
    """A folder with the config.json of a tiny model whose vocabulary has room for builtin:words."""
    settings = json.loads((ROOT / "tests/golden/qwen2_tied/config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 192}))
    return folder


def test_a_model_folder_without_weights_is_refused(refuse, tmp_path):
    message = refuse(TINY, *CHEAP, f"--config.model.path={model_folder(tmp_path)}")
    assert SINGLE in message and "missing" in message and "download" in message


def test_a_model_folder_with_half_a_file_of_weights_is_refused(refuse, tmp_path):
    folder = model_folder(tmp_path)
    whole = (ROOT / "tests/golden/qwen2_tied" / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[: len(whole) // 2])
    message = refuse(TINY, *CHEAP, f"--config.model.path={folder}")
    assert SINGLE in message and "download" in message


def test_weights_that_are_not_finite_are_refused_by_name(refuse, tmp_path):
    folder = model_folder(tmp_path)
    tensors = load_file(ROOT / "tests/golden/qwen2_tied" / SINGLE)
    tensors["model.embed_tokens.weight"] = np.zeros((192, 32), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.array(tensors["model.layers.1.mlp.up_proj.weight"], np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / SINGLE)
    message = refuse(TINY, *CHEAP, f"--config.model.path={folder}")
    assert "model.layers.1.mlp.up_proj.weight has 1 values of" in message and "NaN or infinite; download" in message


def test_a_chat_template_that_fails_is_refused_with_its_error(refuse, tmp_path):
    load_tokenizer("builtin:words").save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text("{{ messages[5].content }}")
    message = refuse(TINY, f"--config.data.tokenizer={tmp_path / 'tokenizer'}", "--config.data.template=chat")
    assert "its chat template fails (UndefinedError" in message and "data.template" in message


def test_a_model_folder_without_config_is_refused(refuse, tmp_path):
    message = refuse(TINY, f"--config.model.path={tmp_path}")
    assert "config.json" in message and "folder of a Hugging Face model" in message


def test_a_workdir_that_holds_a_run_with_other_settings_is_refused(refuse, tmp_path):
    record_run(tmp_path, '{"update": 5}\n')
    message = refuse(TINY, "--config.seed=7")
    assert "other settings: seed was 0 and is 7. Use another --workdir" in message  # and nothing else has changed
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 0  # nor was its record touched


def test_a_run_may_be_given_the_published_values_that_it_started_with_and_no_others(refuse, tmp_path):
    record_run(tmp_path, '{"update": 5}\n')
    published = "--config.loss.n=1.0", "--config.loss.clip_high=0.28", "--config.rollout.dynamic_sampling=False"
    message = refuse(TINY, *published, "--config.loss.m=3.0")
    assert "other settings: loss.m was 2.0 and is 3.0. Use another" in message


def test_a_workdir_in_which_nothing_was_computed_may_be_used_with_other_settings(refuse, tmp_path):
    record_run(tmp_path)  # as a run leaves it that was refused for its data, and is now started with them put right
    message = refuse(TINY, "--config.seed=7", "--config.data.train=nowhere.jsonl")
    assert "other settings" not in message and "nowhere.jsonl" in message
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 7


def record_run(tmp_path, metrics=""):
    config = load([TINY])
    workdir.claim_workdir(resolve(config), tmp_path / "run")
    (tmp_path / "run/sft").mkdir()
    (tmp_path / "run/sft/metrics.jsonl").write_text(metrics)


def test_a_run_whose_problems_were_edited_meanwhile_is_refused(refuse, tmp_path):
    record_run(tmp_path, '{"update": 5}\n')
    workdir.write_problems(tmp_path / "run", workdir.fingerprints({"held_out": [Problem("1", "2 + 2?", "5", "test")]}))
    message = refuse(TINY)
    assert "other held_out problems: they were 1 and are 12, or their texts have changed. Put them back" in message


def test_the_problems_of_a_run_are_known_by_their_content(tmp_path):
    record_run(tmp_path, '{"update": 5}\n')
    problem, config, run = Problem("1", "2 + 2?", "5", "test"), load([TINY]), tmp_path / "run"

    def claim(sets):
        workdir.claim_problems(config, run, workdir.fingerprints(sets))
        workdir.write_problems(run, workdir.fingerprints(sets))  # as of a run that goes on

    claim({"training": [problem], "aime24": [problem]})
    claim({"training": [problem]})  # the same, and one set less
    for name in ("training", "aime24"):  # which is not forgotten
        with pytest.raises(ValueError, match=f"other {name} problems"):
            claim({"training": [problem]} | {name: [problem._replace(answer="4")]})


def test_a_warm_start_on_problems_without_solutions_is_refused(refuse, tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"problem": "2 + 2?", "answer": "4"}\n')
    message = refuse(TINY, f"--config.sft.data={tmp_path / 'problems.jsonl'}", module=sft)
    assert "problems-1 has no solution" in message and "add the field" in message


def test_a_warm_start_of_no_updates_is_refused(refuse):
    message = refuse(TINY, "--config.sft.updates=0", module=sft)
    assert "sft.updates is 0" in message and "give the number" in message


@pytest.mark.parametrize("change, expected", [
    ("kl=replace(config.kl, estimator='x')", ["kl.estimator is 'x'", "'k1', 'k2', 'k3'"]),
    ("reward=replace(config.reward, truncated='maks')", ["reward.truncated is 'maks'", "did you mean 'mask'"]),
    ("deterministic='no'", ["deterministic is 'no'", "give True or False"]),
    ("data=replace(config.data, template=3)", ["data.template is 3", "write it in quotes"]),
    ("checkpoint=replace(config.checkpoint, accept_changes='optimizr')", ["'optimizr'", "did you mean optimizer"]),
])  # fmt: skip
def test_a_config_file_with_a_wrong_word_or_kind_is_refused(change, expected, refuse, tmp_path):
    (tmp_path / "mine.py").write_text(
        (ROOT / "tests/tiny_config.py").read_text()
        + "\nfrom dataclasses import replace\nconfig = get_config()\n"
        + f"def get_config():\n    return replace(config, {change})\n"
    )
    message = refuse(f"--config={tmp_path / 'mine.py'}")
    assert "mine.py" in message
    for text in expected:
        assert text in message


@pytest.mark.parametrize("error, expected", [
    (IsADirectoryError(21, "Is a directory", "a/b"), "error: a/b: Is a directory; move it away, or use another --workdir.\n"),
    (OSError(21, "Is a directory", "a.partial", None, "a"), "error: a: Is a directory; move it away, or use another --workdir.\n"),
    (PermissionError(13, "Permission denied", "a"), "error: a: Permission denied; make it accessible, or use another --workdir.\n"),
    (OSError("no more words"), "error: no more words\n"),
    (MemoryError(), f"error: out of memory; lower {session.SMALLER}, or free some.\n"),
    (MemoryError("Unable to allocate 1 EiB\nfor an array"), f"error: out of memory (Unable to allocate 1 EiB for an array); lower {session.SMALLER}, or free some.\n"),
])  # fmt: skip
def test_what_only_the_system_says_is_one_line_with_what_to_do(error, expected, monkeypatch, capfd, tmp_path):
    def story(*_):
        raise error

    monkeypatch.setattr(session, "use_compilation_cache", lambda: None)
    monkeypatch.delenv("DGPO_JAX_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", TINY, f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        session.run_command("dgpo_jax.train", "", story)
    assert stop.value.code == 1 and capfd.readouterr().err == expected
