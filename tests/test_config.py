"""Settings: the files in configs/ load, the command line changes them, and each rule refuses what breaks it."""

import dataclasses
import json
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgpo_jax import build
from dgpo_jax.config import (
    CheckpointConfig,
    CodeConfig,
    Config,
    CorrectionConfig,
    DataConfig,
    EvalConfig,
    KlConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    UpdateConfig,
    default_workdir,
    fixed_settings,
    flatten,
    load,
    parse_command,
    to_json,
)
from dgpo_jax.rl.advantages import ESTIMATORS
from dgpo_jax.rl.aggregation import MODES
from dgpo_jax.rl.losses import METHODS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.py"))
SMOKE = f"--config={ROOT / 'configs/smoke.py'}"
SECTIONS = (
    ModelConfig, MeshConfig, DataConfig, RolloutConfig, RewardConfig, CodeConfig, LossConfig, KlConfig, CorrectionConfig,
    UpdateConfig, OptimizerConfig, SftConfig, EvalConfig, PrepareConfig, CheckpointConfig,
)  # fmt: skip


def plain(message):
    """A message without the box around it and the line ends inside it."""
    return " ".join("".join(" " if letter in "╭─╮│╰╯" else letter for letter in message).split())


def test_there_are_the_configs_that_the_readme_promises():
    assert [path.stem for path in CONFIGS] == [
        "eval_qwen_1p5b", "eval_smollm2", "qwen_14b", "qwen_14b_32k_v5p", "qwen_1p5b", "qwen_1p5b_32k_v6e", "qwen_1p5b_8k_v5e", "qwen_7b",
        "qwen_7b_16k_tpu", "smoke", "smoke_code", "smollm2",
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_its_name_and_command(path):
    config = load([f"--config={path}"])
    assert isinstance(config, Config)
    assert config.name == path.stem  # the default workdir is named after it
    command = "evaluate" if path.stem.startswith("eval_") else "train"
    assert f"python -m dgpo_jax.{command} --config=configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", [path for path in CONFIGS if "eval" not in path.stem], ids=lambda path: path.stem)
def test_every_config_makes_several_updates_of_one_rollout(path):
    assert load([f"--config={path}"]).update.updates >= 4  # with one, DGPO and GRPO are the same


@pytest.mark.parametrize("spelling", ["--config.loss.clip_low=0.1", "--config.loss.clip-low=0.1"])
def test_a_setting_is_changed_by_its_name_with_low_lines_or_hyphens(spelling):
    config = load([SMOKE, spelling])
    assert config == replace(load([SMOKE]), loss=replace(load([SMOKE]).loss, clip_low=0.1))


def test_several_settings_of_all_types_are_changed_at_once():
    config = load(
        [SMOKE, "--config.seed=7", "--config.loss.method=grpo", "--config.optimizer.learning_rate=3e-4",
         "--config.model.qkv_bias=False", "--config.data.instruction=a = \\boxed{b}"]
    )  # fmt: skip
    assert (config.seed, config.loss.method, config.optimizer.learning_rate) == (7, "grpo", 3e-4)
    assert config.model.qkv_bias is False
    assert config.data.instruction == "a = \\boxed{b}"  # an equals sign and braces are text


@pytest.mark.parametrize("name, text, expected", [
    ("loss.n", "0.5", 0.5),
    ("loss.n", "2", 2.0),  # a whole number is a number too
    ("loss.n", "None", None),  # back to the method's own
    ("loss.dual_clip", "3.0", 3.0),
    ("loss.dual_clip", "None", None),
    ("loss.clip_low", "None", None),
    ("loss.clip_high", "0.3", 0.3),
    ("loss.aggregation", "seq-mean-token-mean", "seq-mean-token-mean"),
    ("loss.aggregation", "None", None),
    ("loss.aggregation_scale", "4096", 4096),
    ("loss.advantage", "reinforce_plus_plus", "reinforce_plus_plus"),
    ("rollout.dynamic_sampling", "True", True),  # neither yes nor no is None
    ("rollout.dynamic_sampling", "False", False),
    ("rollout.dynamic_sampling", "None", None),
    ("reward.overlong_buffer", "0", 0),  # off, whatever the method
    ("reward.overlong_buffer", "None", None),
    ("reward.incorrect", "-1", -1.0),
    ("reward.incorrect", "None", None),
    ("reward.no_think_end", "-0.5", -0.5),  # a minus sign is no option
    ("data.low", "3", 3),
    ("data.low", "None", None),
])  # fmt: skip
def test_a_setting_that_may_be_left_open_takes_a_number_or_none(name, text, expected):
    value = flatten(load([SMOKE, f"--config.{name}={text}"]))[name]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("argument, expected", [
    ("--config.data.low=1.5", "--config.data.low"),  # an int or None
    ("--config.loss.n=some", "--config.loss.n"),  # a float or None
    ("--config.seed=abc", "--config.seed"),
    ("--config.seed=1.5", "--config.seed"),
    ("--config.model.qkv_bias=maybe", "--config.model.qkv-bias"),
    ("--config.loss.method=ppo", ", ".join(map(repr, METHODS))),  # what there is to choose from
    ("--config.loss.advantage=gae", "'rloo'"),
    ("--config.rollout.dynamic_sampling=maybe", "--config.rollout.dynamic-sampling"),
    ("--config.correction.weights=tokens", "'none', 'token', 'sequence'"),
    ("--config.model.dtype=float16", "'auto', 'float32', 'bfloat16'"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_the_name_of_its_setting(argument, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        load([SMOKE, argument])
    assert stop.value.code == 2
    assert expected in plain(capsys.readouterr().err)


@pytest.mark.parametrize("misspelt, meant", [
    ("loss.clp_low=0.1", "--config.loss.clip-low"),
    ("sedd=1", "--config.seed"),
    ("rolout.group_size=4", "--config.rollout.group-size"),  # the section, not the setting
])  # fmt: skip
def test_a_misspelt_setting_is_refused_with_the_one_that_was_meant(misspelt, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        load([SMOKE, f"--config.{misspelt}"])
    assert stop.value.code == 2
    assert meant in plain(capsys.readouterr().err)


# (section, its name on the command line, setting, a value that breaks its rule, a word of the rule or of the fix)
BROKEN = [
    (ModelConfig, "model", "vocab_size", 0, "positive"),
    (ModelConfig, "model", "layers", -1, "positive"),
    (ModelConfig, "model", "width", 0, "at least 1"),
    (ModelConfig, "model", "heads", 0, "positive"),
    (ModelConfig, "model", "heads", 3, "multiple of model.key_heads"),  # key_heads is 2
    (ModelConfig, "model", "key_heads", 0, "positive"),
    (ModelConfig, "model", "head_width", 0, "positive"),
    (ModelConfig, "model", "head_width", 7, "even"),
    (ModelConfig, "model", "mlp_width", 0, "positive"),
    (ModelConfig, "model", "attention_chunk", 0, "positive"),
    (MeshConfig, "mesh", "data", 0, "-1 for the rest"),
    (MeshConfig, "mesh", "fsdp", -2, "-1 for the rest"),
    (MeshConfig, "mesh", "tensor", -1, "only one axis"),  # data is -1 already
    (RolloutConfig, "rollout", "prompts", 0, "at least 1"),
    (RolloutConfig, "rollout", "max_prompt", 0, "at least 1"),
    (RolloutConfig, "rollout", "max_response", 0, "at least 1"),
    (RolloutConfig, "rollout", "group_size", 1, "at least 2"),  # a group of one has nothing to be compared with
    (RolloutConfig, "rollout", "temperature", 0.0, "more than 0"),
    (RolloutConfig, "rollout", "temperature", float("nan"), "more than 0"),
    (RolloutConfig, "rollout", "top_p", 0.0, "at most 1"),
    (RolloutConfig, "rollout", "top_p", 1.5, "at most 1"),
    (RolloutConfig, "rollout", "top_k", -1, "0 for off"),
    (RolloutConfig, "rollout", "max_draws", 0, "at least 1"),
    (RolloutConfig, "rollout", "slots", -8, "0 to have it chosen"),
    (RolloutConfig, "rollout", "staleness", -1, "0 to learn at once"),
    (RewardConfig, "reward", "correct", float("inf"), "give a number"),
    (RewardConfig, "reward", "correct", float("nan"), "give a number"),
    (RewardConfig, "reward", "incorrect", 1.0, "reward.correct is 1.0; lower it"),  # no worse than a right answer
    (RewardConfig, "reward", "incorrect", float("nan"), "must be worth more"),
    (RewardConfig, "reward", "incorrect", float("-inf"), "must be worth more"),  # a group's mean would be no number
    (RewardConfig, "reward", "no_think_end", 1.0, "must be worth more"),
    (RewardConfig, "reward", "no_think_end", float("nan"), "must be worth more"),
    (RewardConfig, "reward", "no_think_start", 1.5, "must be worth more"),
    (RewardConfig, "reward", "no_think_start", float("-inf"), "must be worth more"),
    (RewardConfig, "reward", "overlong_buffer", -1, "0 for no penalty"),
    (RewardConfig, "reward", "overlong_penalty", -1.0, "0 or more"),  # it is taken off, so a negative one would reward
    (RewardConfig, "reward", "overlong_penalty", float("nan"), "0 or more"),
    (RewardConfig, "reward", "workers", 0, "at least 1"),
    (RewardConfig, "reward", "deadline_s", 0.0, "more than 0"),
    (RewardConfig, "reward", "memory_mb", 100, "at least 256"),
    (LossConfig, "loss", "clip_low", -0.1, "1 = no lower bound"),
    (LossConfig, "loss", "clip_low", float("nan"), "0 or more"),
    (LossConfig, "loss", "clip_high", -0.1, "0 or more"),
    (LossConfig, "loss", "m", 0.5, "1 or more"),
    (LossConfig, "loss", "n", -1.5, "-1 or more"),
    (LossConfig, "loss", "dual_clip", 1.0, "above 1 + clip_high"),  # whatever clip_high is going to be
    (LossConfig, "loss", "beta1", -0.1, "0 or more"),
    (LossConfig, "loss", "beta2", -0.1, "0 or more"),
    (LossConfig, "loss", "tau_pos", 0.0, "more than 0"),
    (LossConfig, "loss", "tau_neg", -1.0, "more than 0"),
    (LossConfig, "loss", "soft_clip", 0.5, "1 or more"),
    (LossConfig, "loss", "aggregation_scale", 0, "at least 1"),
    (LossConfig, "loss", "std_floor", -1e-6, "0 or more"),
    (LossConfig, "loss", "max_log_ratio", 0.0, "at most 80"),
    (LossConfig, "loss", "max_log_ratio", 90.0, "at most 80"),
    (LossConfig, "loss", "supervised", -0.1, "0 or more"),
    (LossConfig, "loss", "entropy", -0.1, "0 or more"),
    (LossConfig, "loss", "entropy", float("nan"), "0 or more"),
    (KlConfig, "kl", "coefficient", -0.1, "0 for off"),
    (KlConfig, "kl", "estimator", "k1", "kl.place=reward"),  # in the loss, where it is by default
    (CorrectionConfig, "correction", "cap", 0.0, "more than 0"),
    (CorrectionConfig, "correction", "low", 1.0, "around 1"),  # would leave out what needs no correction
    (CorrectionConfig, "correction", "low", -0.1, "around 1"),
    (CorrectionConfig, "correction", "high", 1.0, "around 1"),
    (CorrectionConfig, "correction", "high", float("nan"), "around 1"),
    (UpdateConfig, "update", "updates", 0, "at least 1"),
    (UpdateConfig, "update", "tokens_per_row", 0, "at least 1"),
    (UpdateConfig, "update", "tokens_per_device", 0, "at least 1"),
    (UpdateConfig, "update", "logprob_chunk", 0, "at least 1"),
    (OptimizerConfig, "optimizer", "learning_rate", 0.0, "more than 0"),
    (OptimizerConfig, "optimizer", "warmup_iterations", -1, "0 for none"),
    (OptimizerConfig, "optimizer", "beta1", 1.0, "[0, 1)"),
    (OptimizerConfig, "optimizer", "beta2", -0.1, "[0, 1)"),
    (OptimizerConfig, "optimizer", "eps", 0.0, "more than 0"),
    (OptimizerConfig, "optimizer", "clip_norm", 0.0, "more than 0"),
    (OptimizerConfig, "optimizer", "weight_decay", -0.1, "0 for none"),
    (OptimizerConfig, "optimizer", "max_skipped", 0, "at least 1"),
    (SftConfig, "sft", "updates", -1, "0 for none"),
    (SftConfig, "sft", "examples", 0, "at least 1"),
    (SftConfig, "sft", "log_every", 0, "at least 1"),
    (SftConfig, "sft", "checkpoint_every", 0, "at least 1"),
    (SftConfig, "sft", "learning_rate", 0.0, "more than 0"),
    (SftConfig, "sft", "warmup_updates", -1, "0 for none"),
    (EvalConfig, "eval", "every", -1, "first and last only"),
    (EvalConfig, "eval", "problems", -1, "data.held_out=''"),
    (EvalConfig, "eval", "samples", -1, "greedy only"),
    (EvalConfig, "eval", "temperature", 0.0, "more than 0"),
    (EvalConfig, "eval", "top_p", 0.0, "at most 1"),
    (EvalConfig, "eval", "max_response", -1, "that of the rollout"),
    (EvalConfig, "eval", "responses", -1, "that of the rollout"),
    (CodeConfig, "code", "workers", 0, "at least 1"),
    (CodeConfig, "code", "test_s", 0.0, "more than 0"),
    (CodeConfig, "code", "wall_s", float("nan"), "more than 0"),
    (CodeConfig, "code", "wall_s", 10.0, "3 times code.test_s, 12.0"),
    (CodeConfig, "code", "memory_mb", 16, "at least 64"),
    (CodeConfig, "code", "max_tests", -1, "0 for all"),
    (PrepareConfig, "prepare", "ngram", 0, "9 to 13"),
    (PrepareConfig, "prepare", "max_solution", -1, "0 for no limit"),
    (PrepareConfig, "prepare", "pass_above", 1.5, "0 to 1"),
    (PrepareConfig, "prepare", "pass_below", float("nan"), "0 to 1"),
    (CheckpointConfig, "checkpoint", "every", 0, "at least 1"),
    (CheckpointConfig, "checkpoint", "keep", 0, "at least 1"),
]


@pytest.mark.parametrize("section, name, setting, value, expected", BROKEN)
def test_a_setting_that_breaks_its_rule_is_refused_with_value_and_fix(section, name, setting, value, expected):
    with pytest.raises(ValueError) as refusal:
        section(**{setting: value})
    message = str(refusal.value)
    # Rules of the whole mesh name the mesh, that of the interval both its ends; all others name the setting.
    several = {"mesh": "mesh is (", "correction": "correction.low, correction.high is ("}
    together = name == "mesh" or setting in ("low", "high")
    assert message.startswith(several[name] if together else f"{name}.{setting} is {value!r}") and repr(value) in message
    assert expected in message and "\n" not in message


@pytest.mark.parametrize("section, setting, value, expected", [
    (ModelConfig, "dtype", "float16", "model.dtype is 'float16', but it is one of 'auto', 'float32', 'bfloat16'; did you mean 'bfloat16'"),
    (KlConfig, "estimator", "x", "kl.estimator is 'x', but it is one of 'k1', 'k2', 'k3'; choose one of them"),
    (LossConfig, "aggregation", 3, "'seq-mean-token-sum-norm' or None"),
    (RolloutConfig, "prompts", 8.0, "rollout.prompts is 8.0, but it is a whole number; write it without a point"),
    (RolloutConfig, "prompts", True, "rollout.prompts is True, but it is a whole number"),
    (RolloutConfig, "prompts", "8", "rollout.prompts is '8'"),  # found before its own rule compares it with 0
    (RolloutConfig, "int8_cache", 1, "rollout.int8_cache is 1, but it is yes or no; give True or False"),
    (DataConfig, "train", Path("a.jsonl"), "data.train is PosixPath('a.jsonl'), but it is a text; write it in quotes"),
    (DataConfig, "train", None, "data.train is None"),
    (DataConfig, "low", 0.5, "data.low is 0.5, but it is a whole number or None"),
    (OptimizerConfig, "learning_rate", np.float32(1e-3), "optimizer.learning_rate is np.float32(0.001), but it is a number of Python's own"),
    (OptimizerConfig, "learning_rate", True, "optimizer.learning_rate is True"),
    (LossConfig, "clip_low", "0.2", "loss.clip_low is '0.2', but it is a number of Python's own or None"),
    (Config, "seed", np.int64(3), "seed is np.int64(3), but it is a whole number"),
    (Config, "iterations", 2.5, "iterations is 2.5"),
    (Config, "deterministic", "no", "deterministic is 'no', but it is yes or no"),
    (Config, "model", {"layers": 2}, "model is {'layers': 2}, but it is a group of settings; give a ModelConfig"),
    (Config, "name", ["x" * 1000], "..., but it is a text"),  # the message stays short
])  # fmt: skip
def test_a_value_of_another_kind_than_its_setting_is_refused_with_what_would_do(section, setting, value, expected):
    with pytest.raises(ValueError) as refusal:
        section(**{setting: value})
    assert expected in str(refusal.value) and len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


def test_a_whole_number_will_do_for_a_number_and_none_where_it_is_allowed():
    assert OptimizerConfig(learning_rate=1).learning_rate == 1
    assert LossConfig(clip_low=1, clip_high=None, aggregation=None).clip_low == 1


@pytest.mark.parametrize("name", ["rope_theta", "rope_factor"])
def test_the_base_of_wavelengths_is_positive(name):
    with pytest.raises(ValueError, match=f"model.{name} is 0, but wavelengths are positive; give more than 0"):
        ModelConfig(**{name: 0})


@pytest.mark.parametrize("names", ["", "all", "problems, model_files", "optimizer", "optimizer.learning_rate,rollout , seed,"])
def test_changes_are_accepted_by_setting_group_or_kind(names):
    assert Config(checkpoint=CheckpointConfig(accept_changes=names))


@pytest.mark.parametrize("names, expected", [
    ("optimizr", "there is no setting 'optimizr'; did you mean optimizer"),
    ("seed, optimizer.learning_rat", "there is no setting 'optimizer.learning_rat'; did you mean optimizer.learning_rate"),
    ("model-files", "did you mean model_files"),
    ("?", "name settings, groups such as optimizer, problems, model_files, or all"),
])  # fmt: skip
def test_a_change_of_what_is_no_setting_is_refused(names, expected):
    with pytest.raises(ValueError, match=r"checkpoint\.accept_changes is") as refusal:
        Config(checkpoint=CheckpointConfig(accept_changes=names))
    assert expected in str(refusal.value)


@pytest.mark.parametrize("ending", ["exit()", "raise SystemExit(0)", "exit('no')"])
def test_a_config_file_that_ends_python_is_refused(tmp_path, capsys, ending):
    (tmp_path / "ends.py").write_text(f"from sys import exit\ndef get_config():\n    {ending}\n")
    with pytest.raises(SystemExit) as stop:
        load([f"--config={tmp_path / 'ends.py'}"])
    assert stop.value.code == 2
    assert "ends.py: it ends Python (SystemExit: " in capsys.readouterr().err


@pytest.mark.parametrize("context, row, device, rows", [
    (1, 1024, 1024, 1),
    (1, 1024, 3072, 3),
    (4, 4096, 1024, 1),  # four devices share a row
    (4, 4096, 3072, 3),
    (-1, 1024, 512, None),  # not known yet
])
def test_rows_of_a_microbatch_are_whole_over_the_devices_that_share_them(context, row, device, rows):
    config = Config(mesh=MeshConfig(context=context, data=1), update=UpdateConfig(tokens_per_row=row, tokens_per_device=device))
    assert rows is None or config.update.rows_per_replica(context) == rows


@pytest.mark.parametrize("context, row, device, complaint", [
    (1, 1024, 1500, "whole rows of 1024 tokens; make it a multiple of update.tokens_per_row"),
    (4, 4096, 1536, "times mesh.context = 4 is whole rows of 4096"),
    (4, 4100, 1025, "make it a multiple of 8"),
])
def test_rows_that_devices_cannot_share_are_refused(context, row, device, complaint):
    with pytest.raises(ValueError, match=complaint):
        Config(mesh=MeshConfig(context=context, data=1), update=UpdateConfig(tokens_per_row=row, tokens_per_device=device))


@pytest.mark.parametrize("above, below", [(0.9, 0.1), (0.5, 0.5), (1.0, None), (None, 0.0)])
def test_bounds_that_no_pass_rate_fits_between_are_refused(above, below):
    with pytest.raises(ValueError, match=r"prepare.pass_above, prepare.pass_below is \(.*raise the second"):
        PrepareConfig(pass_above=above, pass_below=below)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"eval\.greedy is False, but with eval.samples at 0 nothing would be evaluated"):
        EvalConfig(samples=0, greedy=False)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Of some command."""

    checkpoint: str = ""  # whose weights
    regrade: bool = False  # again


@pytest.mark.parametrize("arguments, expected", [
    ([], (None, Flags())),
    (["--regrade", "--workdir=here", "--checkpoint=there"], (Path("here"), Flags("there", True))),
])  # fmt: skip
def test_a_command_may_have_flags_of_its_own(arguments, expected):
    config, *rest = parse_command([SMOKE, "--config.seed=5", *arguments], program="test", description="", options=Flags)
    assert config.seed == 5 and tuple(rest) == expected


def test_what_is_left_open_breaks_no_rule():
    loss = LossConfig()
    left_open = {name for name, value in vars(loss).items() if value is None}
    assert left_open == {
        "clip_low", "clip_high", "n", "m", "beta1", "beta2", "tau_pos", "tau_neg", "soft_clip", "dual_clip", "aggregation",
        "aggregation_scale", "advantage",
    }  # fmt: skip
    assert RolloutConfig().dynamic_sampling is None
    assert RewardConfig().overlong_buffer is None and RewardConfig().incorrect is None
    # What is off is off for every method, and not a method's own.
    assert (loss.supervised, loss.entropy, KlConfig().coefficient) == (0, 0, 0)
    assert (CorrectionConfig().weights, CorrectionConfig().reject, RewardConfig().truncated) == ("none", "none", "keep")


@pytest.mark.parametrize("settings", [
    {"clip_low": 1.0},  # no lower bound
    {"clip_low": 2.5},  # nor here; of the log-ratio, for gmpo, it is a bound
    {"clip_low": 0.0, "clip_high": 0.0},
    {"clip_high": 0.28, "dual_clip": 1.29},
    {"n": -1.0, "m": 1.0, "soft_clip": 1.0, "beta1": 0.0, "beta2": 0.0, "std_floor": 0.0},
])  # fmt: skip
def test_a_setting_may_be_at_the_edge_of_its_rule(settings):
    assert LossConfig(**settings)


def test_a_dual_clip_inside_the_region_is_refused():
    with pytest.raises(ValueError, match=r"loss.dual_clip is 1.2, .* raise it above 1 \+ clip_high, or None"):
        LossConfig(clip_high=0.28, dual_clip=1.2)


@pytest.mark.parametrize("settings", [
    {"correct": 0.0},  # what a wrong answer is worth is not known before the method is
    {"correct": 0.0, "incorrect": -0.5},
    {"incorrect": 0.99, "no_think_end": 0.99, "no_think_start": 0.99},
    {"incorrect": -1.0, "no_think_end": -0.5, "no_think_start": -2.0},  # a missing tag may be worth more or less than a wrong answer
])  # fmt: skip
def test_whatever_is_worth_less_than_a_right_answer_is_a_reward(settings):
    assert RewardConfig(**settings)


@pytest.mark.parametrize("settings, in_loss, in_reward", [
    ({}, False, False),
    ({"place": "reward"}, False, False),  # without a coefficient there is none anywhere
    ({"coefficient": 0.1}, True, False),
    ({"coefficient": 0.1, "place": "reward"}, False, True),
])  # fmt: skip
def test_a_kl_is_in_one_place_or_in_none(settings, in_loss, in_reward):
    kl = KlConfig(**settings)
    assert (kl.in_loss, kl.in_reward) == (in_loss, in_reward)


@pytest.mark.parametrize("method", ["gspo", "gmpo"])
def test_a_method_of_whole_sequences_refuses_a_correction_of_single_tokens(method):
    loss = LossConfig(method=method)
    for settings in ({"weights": "token"}, {"reject": "token"}, {"weights": "sequence", "reject": "token"}):
        with pytest.raises(ValueError, match=rf"correction is \(.*'token'.*, but {method} takes a sequence as one .* use sequence or geometric"):
            Config(loss=loss, correction=CorrectionConfig(**settings))
        assert Config(correction=CorrectionConfig(**settings))  # the others see tokens
    assert Config(loss=loss, correction=CorrectionConfig(weights="sequence", reject="geometric"))


def test_k1_is_for_the_reward():
    assert KlConfig(estimator="k1", place="reward").estimator == "k1"


def test_the_penalised_end_of_a_response_is_no_longer_than_a_response():
    rollout = RolloutConfig(max_response=32)
    assert Config(rollout=rollout, reward=RewardConfig(overlong_buffer=32))
    with pytest.raises(ValueError, match=r"reward.overlong_buffer is 33, .* at most 32 tokens; give at most rollout.max_response"):
        Config(rollout=rollout, reward=RewardConfig(overlong_buffer=33))


@pytest.mark.parametrize("correction", [{"weights": "token"}, {"weights": "sequence"}, {"reject": "geometric"}])
def test_a_correction_needs_the_trainers_log_probabilities(correction):
    correction = CorrectionConfig(**correction)
    assert Config(correction=correction)
    with pytest.raises(ValueError, match=r"update.old_logprobs is 'sampler', .* use trainer, or no correction"):
        Config(correction=correction, update=UpdateConfig(old_logprobs="sampler"))
    assert Config(update=UpdateConfig(old_logprobs="sampler"))


def test_the_choices_are_what_the_formulas_know():
    choices = typing.get_type_hints(LossConfig)
    assert typing.get_args(choices["method"]) == tuple(METHODS)
    assert typing.get_args(typing.get_args(choices["aggregation"])[0]) == MODES
    assert typing.get_args(typing.get_args(choices["advantage"])[0]) == tuple(ESTIMATORS)


@pytest.mark.parametrize("setting, value, expected", [
    ("iterations", -1, "warm start only"),
    ("seed", -1, "0 to 2147483647"),
    ("seed", 2**31, "31 bits"),
])  # fmt: skip
def test_a_setting_of_the_run_that_breaks_its_rule_is_refused(setting, value, expected):
    with pytest.raises(ValueError, match=f"{setting} is {value}.*{expected}"):
        Config(**{setting: value})


def test_a_packed_row_must_hold_the_longest_prompt_and_response():
    rollout = RolloutConfig(max_prompt=64, max_response=32)
    build.check_row_length(Config(rollout=rollout, update=UpdateConfig(tokens_per_row=96, tokens_per_device=96)))
    with pytest.raises(ValueError, match=r"update.tokens_per_row is 95, .* 96 tokens .* at least 96"):
        build.check_row_length(Config(rollout=rollout, update=UpdateConfig(tokens_per_row=95, tokens_per_device=95)))


def test_updates_must_divide_the_prompts():
    with pytest.raises(ValueError, match=r"update.updates is 3, .* 32 groups; .*divisor of rollout.prompts"):
        Config(update=UpdateConfig(updates=3))


@pytest.mark.parametrize("change, same", [
    ("loss.clip_low=0.1", False),
    ("seed=1", False),
    ("model.width=64", False),
    ("sft.updates=3", False),
    ("kl.coefficient=0.1", False),
    ("correction.cap=3.0", False),
    ("rollout.staleness=1", False),
    ("name=other", False),
    ("iterations=99", True),  # a run that is made longer goes on
    ("mesh.data=2", True),  # as one does on another machine
    ("checkpoint.every=1", True),
    ("eval.every=1", True),
    ("reward.workers=7", True),
    ("update.tokens_per_device=512", True),  # more or fewer rows at once: the same sum
])  # fmt: skip
def test_the_default_workdir_changes_with_what_is_computed_and_with_nothing_else(change, same):
    changed = load([SMOKE, f"--config.{change}"])
    assert (default_workdir(changed) == default_workdir(load([SMOKE]))) == same


def test_the_default_workdir_is_named_after_the_run():
    folder, name = default_workdir(Config(name="sums")).parts
    assert folder == "runs" and name.startswith("sums-") and len(name) == len("sums-") + 8


def test_fixed_settings_leave_out_only_what_may_change():
    config = Config()
    left_out = flatten(config).keys() - fixed_settings(config).keys()
    assert left_out == {
        "iterations", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "rollout.slots", "reward.workers",
        "reward.deadline_s", "reward.memory_mb", "code.workers", "eval.every", "eval.responses", "update.tokens_per_device",
        "data.data_dir", "data.manual_dir", "sft.checkpoint_every", "profile", "peak_tflops", "stop_after_minutes", "grace_seconds",
        "deterministic",
    } | {
        f"{group}.{field.name}"
        for group in ("prepare", "checkpoint", "guard", "hosts")
        for field in dataclasses.fields(getattr(config, group))
    }  # fmt: skip
    assert fixed_settings(config)["loss.method"] == "dgpo"


def test_the_recorded_config_reads_back_to_the_same_settings():
    config = load([SMOKE])
    recorded = json.loads(to_json(config))
    sections = {section.name: section.type for section in dataclasses.fields(Config)}
    assert Config(**{name: sections[name](**value) if isinstance(value, dict) else value for name, value in recorded.items()}) == config


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_comment_which_is_its_help(section):
    lines = (ROOT / "dgpo_jax/config.py").read_text().splitlines()
    for field in dataclasses.fields(section):
        line = next(line for line in lines[lines.index(f"class {section.__name__}:") :] if line.startswith(f"    {field.name}: "))
        assert "  # " in line, line


@pytest.mark.parametrize("text, expected", [
    (None, "no such Python file"),
    ("def get_config(:\n", "bad.py, line 1"),  # a syntax error
    ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
    ("from dgpo_jax.config import Confg\n", "Confg"),
    ("def get_config():\n    return Confg()\n", "Confg"),  # a name that is not there
    ("def get_config():\n    return {}['iterations']\n", "iterations"),
    ("x = 1\n", "get_config"),  # no such function
    ("def get_config():\n    return {'seed': 1}\n", "returned dict"),
    ("from dgpo_jax.config import Config\nget_config = lambda: Config(sedd=1)\n", "sedd"),
    ("from dgpo_jax.config import Config\nget_config = lambda: Config(seed=-1)\n", "seed is -1"),
])  # fmt: skip
def test_a_config_file_that_does_not_work_is_refused_by_its_name(text, expected, tmp_path, capsys):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        load([f"--config={path}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and str(path) in error and expected in error
    assert error.count("\n") == 1


def test_a_config_that_is_not_python_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as stop:
        load([f"--config={tmp_path / 'run.yaml'}"])
    assert stop.value.code == 2 and "no such Python file" in capsys.readouterr().err


def test_without_a_config_the_command_to_try_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--config.seed=1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no --config given; try: python -m dgpo_jax.config --config=")
