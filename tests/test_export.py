"""Checkpoints leave as Hugging Face folders with the same weights, to the bit, and transformers computes the same from them.

The folders of golden/ were written by transformers (see make_models.py): their tensors are what an export must give back.
"""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dgpo_jax import export as story
from dgpo_jax.build import build_actor, build_params
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import Config, DataConfig, ModelConfig, RolloutConfig, UpdateConfig, to_json
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.export import Options, export
from dgpo_jax.models import build, config_from_folder, hf_export, load_parameters
from dgpo_jax.models.hf_export import plan_shards, write_weights
from dgpo_jax.models.parameters import parameter_shardings, table
from dgpo_jax.sharding import make_mesh, to_device
from dgpo_jax.types import TrainState
from tests.tiny_config import get_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2", "qwen2_tied", "qwen2_yarn", "qwen3", "llama")  # f32 in 3 files, then bf16, bf16, bf16 and f16

TINY = replace(get_config().model, head_width=6)  # not width / heads, which readers take for an absent head_dim
MODELS = {
    "qwen2 tied": TINY,
    "qwen2 untied": replace(TINY, tied_embeddings=False, rope_theta=1e6, norm_eps=1e-5),
    "qwen2 yarn": replace(TINY, rope_scaling="yarn", rope_factor=4.0, rope_original_length=16),
    "qwen3": replace(TINY, qkv_bias=False, qk_norm=True),
    "llama": replace(TINY, qkv_bias=False, tied_embeddings=False),
}


def random_params(model, seed=0):
    """Normal in every array: norms of one and biases of zero would hide that two were exchanged."""
    random, params = np.random.default_rng(seed), {}
    for name, row in table(model).items():
        params[name] = random.normal(float(name.endswith("scale")), 0.2, row.shape).astype(np.float32)
    return params


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def flat(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def write_run(workdir, model, params, iterations=(4,), tokenizer="builtin:words"):
    """A workdir as training leaves it, with these weights, the iteration added to the final norm.

    Args:
        iterations: those with a checkpoint; a dict gives their scores.
    """
    workdir.mkdir(exist_ok=True)
    config = Config(model=model, data=DataConfig(tokenizer=tokenizer), rollout=RolloutConfig(temperature=0.7), update=UpdateConfig())
    (workdir / "config.json").write_text(to_json(config))
    write_checkpoints(workdir, params, iterations)
    return workdir


def write_checkpoints(run, params, iterations, extra=None):
    scores = iterations if isinstance(iterations, dict) else {}
    with Checkpoints(run / "checkpoints", keep=9) as checkpoints:
        for iteration in iterations:
            own = params | {"final_norm/scale": params["final_norm/scale"] + iteration}
            state = TrainState(jnp.int32(0), nested(jax.tree.map(jnp.asarray, own)), ())
            checkpoints.save(iteration, state, extra or {}, score=scores.get(iteration))


def iteration_of(folder):
    """Which of `write_checkpoints` it was made from."""
    weights = load_file(folder / "model.safetensors")["model.norm.weight"]
    return round(float(weights.astype(np.float32).mean() - random_params(TINY)["final_norm/scale"].mean()))


def exported(run, output, **options):
    return export(Options(str(run), str(output), **options))


def read_tensors(folder):
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run from random weights with checkpoints of iterations 2 and 4, and a warm start with its 60th update."""
    params = random_params(TINY)
    workdir = write_run(tmp_path_factory.mktemp("run") / "run", TINY, params, (2, 4))
    write_checkpoints(workdir / "sft", params, (60,))
    return workdir


@pytest.fixture
def own_run(run, tmp_path):
    """A copy to damage."""
    return shutil.copytree(run, tmp_path / "own_run")


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_wrote_comes_back_to_the_bit(name, tmp_path):
    model = ModelConfig(**config_from_folder(GOLDEN / name))
    params = flat(load_parameters(GOLDEN / name, model))
    # a run's config.json keeps the path and the sizes of its settings, not those of the folder
    run = write_run(tmp_path / "run", ModelConfig(path=str(GOLDEN / name)), params, iterations=(0,))
    source = read_tensors(GOLDEN / name)
    for dtype, cast in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        # f32 holds every value of f16 and bf16; so does bf16 where the source is bf16, and rounds once where it is not
        folder = exported(run, tmp_path / dtype, dtype=dtype, shard_gb=3e-5)
        tensors = read_tensors(folder)
        assert tensors.keys() == source.keys()
        for tensor, values in tensors.items():
            assert values.dtype == cast
            np.testing.assert_array_equal(values, source[tensor].astype(np.float32).astype(cast), err_msg=tensor)
        again = flat(load_parameters(folder, model))
        for parameter, values in params.items():
            np.testing.assert_array_equal(again[parameter], values.astype(cast).astype(np.float32), err_msg=parameter)
        settings, before = (json.loads((path / "config.json").read_text()) for path in (folder, GOLDEN / name))
        assert settings.pop("dtype") == dtype
        before.pop("dtype")
        assert settings == before  # max_position_embeddings, layer_types and whatever else this project does not read


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(MODELS[name])
    folder = exported(write_run(tmp_path / "run", MODELS[name], params, iterations=(0,)), tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.dtype == torch.float32
    tokens = np.random.default_rng(1).integers(0, 192, (2, 40))  # beyond the 16 positions of the YaRN model
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = build(MODELS[name]).logits(nested(params), jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-5)  # 1e-5 measured, of logits up to 9
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_is_read_from_the_config_that_was_written(name, tmp_path):
    settings = hf_export.hugging_face_config(MODELS[name], "float32", 48)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again = ModelConfig(**config_from_folder(tmp_path, path="", dtype="float32", remat="none"))
    # without scaling the original length says nothing, and a folder does not hold it
    assert replace(again, rope_original_length=0) == replace(MODELS[name], rope_original_length=0)
    assert (again.rope_scaling, again.rope_original_length) in (("none", 32768), ("yarn", 16))
    assert settings["max_position_embeddings"] == (64 if name == "qwen2 yarn" else 48)  # 4 times 16; as in training


def test_a_checkpoint_amid_updates_is_not_told_to_be_a_whole_iteration(tmp_path, capsys):
    run = write_run(tmp_path / "run", TINY, random_params(TINY), iterations=())
    write_checkpoints(run, random_params(TINY), (4,), extra={"collected": None})
    write_checkpoints(run, random_params(TINY), (5,), extra={"collected": {"reward/mean": 0.5}})
    exported(run, tmp_path / "whole", checkpoint="iteration_000004")
    exported(run, tmp_path / "amid")
    said = capsys.readouterr().out
    assert f"{tmp_path}/whole: iteration 4 of the run" in said
    assert f"{tmp_path}/amid: iteration 5, amid its updates, of the run" in said


def test_weights_saved_on_eight_devices_are_exported_on_one_without_an_accelerator(tmp_path):
    params, mesh = random_params(TINY), make_mesh(1, 4, 2)
    on_devices = to_device(nested(params), parameter_shardings(TINY, mesh))
    assert len(on_devices["embed"]["table"].sharding.device_set) == 8
    write_run(tmp_path / "run", TINY, params, iterations=())
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(7, TrainState(jnp.int32(0), on_devices, ()), {})
    done = subprocess.run(
        [sys.executable, "-m", "dgpo_jax.export", f"--workdir={tmp_path}/run", f"--output={tmp_path}/out"],
        # No TPU is here: had it been started, that would have been an error.
        env=os.environ | {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "iteration 7 of the run" in done.stdout and f"AutoTokenizer.from_pretrained('{tmp_path}/out')" in done.stdout
    again = flat(load_parameters(tmp_path / "out", TINY))
    assert again.keys() == params.keys()
    for name, values in params.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


def test_files_are_no_larger_than_asked_and_the_index_names_every_tensor(run, tmp_path):
    limit = 20_000  # bytes; the table of 192 x 32 numbers alone has 24,576
    folder = exported(run, tmp_path / "out", shard_gb=limit / 1e9)
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in files:
        with safe_open(file, "np") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            assert all(index["weight_map"].pop(name) == file.name for name in tensors.keys())  # noqa: SIM118 (no dict)
        sizes[file.name] = [array.nbytes for array in load_file(file).values()]
    assert index["weight_map"] == {}
    assert all(sum(inside) <= limit or len(inside) == 1 for inside in sizes.values())
    assert sum(map(sum, sizes.values())) == index["metadata"]["total_size"]
    assert len(files) == 5  # the table, and 68,608 bytes of others in as few as can hold them


def test_one_parameter_at_a_time_is_in_memory(tmp_path):
    params, alive, seen = random_params(TINY), [], []

    def read(name):
        assert not [other for other, reference in alive if reference() is not None]
        values = params[name].copy()
        alive.append((name, weakref.ref(values)))
        seen.append(name)
        return values

    write_weights(tmp_path, TINY, read, "float32", 10**9)
    assert seen == list(params)


def test_a_tensor_at_the_limit_still_fits_and_one_byte_less_begins_a_file():
    sizes = [tensor.size for tensor in plan_shards(TINY, 4, 10**9)[0]]
    both = sizes[0] + sizes[1]
    assert [tensor.size for tensor in plan_shards(TINY, 4, both)[0]] == sizes[:2]
    assert [tensor.size for tensor in plan_shards(TINY, 4, both - 1)[0]] == sizes[:1]


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3", "llama"])  # what transformers reads depends on the model beside it
def test_the_built_in_tokenizer_comes_back_with_its_ids(tmp_path, capsys, name):
    model = MODELS[name]
    folder = exported(write_run(tmp_path / "run", model, random_params(model)), tmp_path / "out")
    assert "warning" not in capsys.readouterr().out
    ours, theirs = load_tokenizer("builtin:words"), load_tokenizer(str(folder))
    for text in ("Tom has 9 apples and buys 17 more.\n", "<|im_start|>\\boxed{-3} é ☃"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.chat("1 + 1 = ?", "sums") == ours.chat("1 + 1 = ?", "sums")
    for what in ("stop_ids", "pad_id", "vocab_size", "turn_end", "text_start"):
        assert getattr(theirs, what) == getattr(ours, what), what
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0,  # of training; transformers' own top_k is 50
        "pad_token_id": ours.pad_id, "bos_token_id": 2, "eos_token_id": ours.stop_ids[0],
    }  # fmt: skip


def test_tokenizer_and_generation_settings_of_the_source_are_kept(tmp_path):
    source = shutil.copytree(GOLDEN / "qwen3", tmp_path / "source")
    load_tokenizer("builtin:words").save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [2]}')
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"torch_dtype": settings.pop("dtype")}))  # the older name
    model = ModelConfig(**config_from_folder(source))
    run = write_run(tmp_path / "run", model, flat(load_parameters(source, model)), tokenizer="")
    folder = exported(run, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((folder / "config.json").read_text()) == settings | {"dtype": "float32"}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"]) == (0.6, 20)
    assert generation["eos_token_id"] == [4, 2]  # the run stopped at <|im_end|> too, which the source does not name
    assert load_tokenizer(str(folder)).stop_ids == load_tokenizer(str(source)).stop_ids

    # On another machine the source is elsewhere.
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"not a folder here.*named with --source"):
        exported(run, tmp_path / "out2")
    assert read_tensors(exported(run, tmp_path / "out2", source=str(moved))).keys() == read_tensors(folder).keys()


def test_a_new_run_starts_from_the_folder(run, tmp_path):
    folder = exported(run, tmp_path / "out")
    config = get_config()
    config = replace(config, model=replace(config.model, path=str(folder)), data=replace(config.data, tokenizer=""))
    actor = build_actor(config)
    assert actor.model.config.head_width == 6 and actor.tokenizer.name == str(folder)
    again, params = flat(build_params(config, actor)), random_params(TINY)
    params["final_norm/scale"] += 4
    for name, values in params.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


@pytest.mark.parametrize(
    "wanted, iteration",
    [
        ("", 4),  # the newest of the run, though the warm start's number is larger
        ("iteration_000002", 2),
        ("sft", 60),
        ("sft/iteration_000060", 60),
    ],
)
def test_the_checkpoint_that_is_asked_for_is_exported(run, tmp_path, capsys, wanted, iteration):
    assert iteration_of(exported(run, tmp_path / "out", checkpoint=wanted)) == iteration
    assert f"iteration {iteration} of the {'warm start' if iteration == 60 else 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scores, best",
    [
        ({2: 0.5, 4: None}, 2),  # not evaluated counts as none
        ({2: 0.5, 4: 0.25}, 2),
        ({2: 0.5, 4: 0.5}, 4),  # of equal ones the newest
        ({2: -0.5, 4: -0.75}, 2),
    ],
)
def test_the_best_is_the_newest_of_those_with_the_highest_score(tmp_path, scores, best):
    run = write_run(tmp_path / "run", TINY, random_params(TINY), scores)
    assert iteration_of(exported(run, tmp_path / "out", checkpoint="best")) == best


@pytest.mark.parametrize("score", ["0.75", True, float("nan"), float("inf"), [1]])
def test_a_score_that_is_no_number_and_a_file_of_such_a_name_are_no_best(tmp_path, score):
    run = write_run(tmp_path / "run", TINY, random_params(TINY), {2: 0.5, 4: None})
    details = run / "checkpoints/iteration_000004/details.json"
    details.write_text(json.dumps(json.loads(details.read_text()) | {"score": score}))
    (run / "checkpoints/iteration_000009").write_text("")
    assert story.find_best(run / "checkpoints").name == "iteration_000002"


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        hf_export.write_json(tmp_path / "config.json", {"rope_theta": float("nan")})
    assert not (tmp_path / "config.json").exists()


def test_memory_that_is_not_there_is_told_in_a_line(capsys, monkeypatch):
    def export(_):
        raise MemoryError("Unable to allocate 1 EiB")

    monkeypatch.setattr(story, "export", export)
    with pytest.raises(SystemExit) as stop:
        story.main(["--workdir=run", "--output=out"])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: out of memory (Unable to allocate 1 EiB); lower ")


def test_a_damaged_best_gives_way_to_the_next_with_the_reason(tmp_path, capsys):
    run = write_run(tmp_path / "run", TINY, random_params(TINY), {2: 0.5, 4: 0.75, 6: 0.25})
    (run / "checkpoints/iteration_000004/manifest.json").unlink()
    assert iteration_of(exported(run, tmp_path / "out", checkpoint="best")) == 2
    assert "warning: not used: iteration_000004 (it was never finished" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(own_run, tmp_path, capsys):
    (own_run / "checkpoints/iteration_000004/manifest.json").unlink()
    assert iteration_of(exported(own_run, tmp_path / "out")) == 2
    assert "warning: not used: iteration_000004 (it was never finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"iteration_000004 is not used: it was never finished"):
        exported(own_run, tmp_path / "named", checkpoint="iteration_000004")
    shutil.rmtree(own_run / "checkpoints")
    assert iteration_of(exported(own_run, tmp_path / "of_warm_start")) == 60  # as a run would go on from it


def spoil_config(text):
    return lambda run: (run / "config.json").write_text(text)


def change_config(section, **changes):
    def change(run):
        settings = json.loads((run / "config.json").read_text())
        settings[section] |= changes
        (run / "config.json").write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    "change, options, message",
    [
        (shutil.rmtree, {}, "there is no config.json; give the folder of a run"),
        (lambda run: (run / "config.json").unlink(), {}, "there is no config.json; give the folder of a run"),
        (spoil_config("{"), {}, "config.json is not JSON .*; put back"),
        (spoil_config("[]"), {}, "config.json holds a list where settings"),
        (spoil_config('{"model": {}}'), {}, "no config of a run .*KeyError: 'data'"),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), {}, "config.json is not JSON"),
        (change_config("model", layers="two"), {}, "no config of a run .*model.layers is 'two', but it is a whole number"),
        (change_config("model", rope_theta=float("nan")), {}, "no config of a run .*model.rope_theta is nan"),
        (change_config("model", rope_theta=float("inf")), {}, "no config of a run .*model.rope_theta is inf, but numbers are kept in 32 bits"),
        (change_config("model", norm_eps=float("nan")), {}, "no config of a run .*model.norm_eps is nan"),
        (change_config("update", tokens_per_row=float("inf")), {}, "no config of a run .*update.tokens_per_row is inf"),
        (change_config("rollout", temperature=float("inf")), {}, "no config of a run .*rollout.temperature is inf"),
        (change_config("data", tokenizer=5), {}, "no config of a run .*data.tokenizer is 5"),
        (change_config("model", path=3), {}, "no config of a run .*model.path is 3"),
        (change_config("model", rope_theta="ten"), {}, "no config of a run .*model.rope_theta is 'ten'"),
        (change_config("model", heads=3), {}, "model.heads is 3, but key heads are shared evenly"),
        (change_config("model", layers=3), {}, r"float32\[2, 2, 6\] in the checkpoint and float32\[3, 2, 6\] here"),
        (change_config("model", qk_norm=True), {}, "key_norm/scale is absent in the checkpoint"),
        (change_config("data", tokenizer=""), {}, "data.tokenizer and model.path are both empty"),
        (change_config("model", path="gone"), {}, "'gone': not a folder here"),
        (lambda run: [shutil.rmtree(run / name) for name in ("checkpoints", "sft")], {}, "there is no finished checkpoint; let the run"),
        (lambda run: shutil.rmtree(run / "sft"), {"checkpoint": "sft"}, "no finished checkpoint of its warm start"),
        (lambda run: None, {"checkpoint": "iteration_000003"}, "give one of iteration_000004, iteration_000002, sft/iteration_000060, best"),
        (lambda run: None, {"checkpoint": "../run/checkpoints/iteration_000004"}, "has none of that name"),
        (lambda run: None, {"checkpoint": "best"}, "no sound checkpoint in .* has a score"),
        (lambda run: None, {"source": "elsewhere"}, "started from random weights; leave it out"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(own_run, tmp_path, monkeypatch, change, options, message):
    def unreachable(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    change(own_run)
    with pytest.raises(ValueError, match=message):
        exported(own_run, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    params = random_params(TINY)
    params["layers/mlp/up/kernel"][1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values of 2048 that are NaN or infinite"):
        exported(write_run(tmp_path / "run", TINY, params), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_transformers_does_not_have_is_refused():
    with pytest.raises(ValueError, match="transformers has no architecture with both"):
        hf_export.hugging_face_config(replace(TINY, qk_norm=True), "float32", 64)


def test_nothing_that_exists_is_replaced(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is a folder with files in it.*give a new name, or delete it"):
        exported(run, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["precious.txt"]
    with pytest.raises(ValueError, match="is a file, and an export is a folder"):
        exported(run, tmp_path / "full/precious.txt")
    (tmp_path / "empty").mkdir()
    assert iteration_of(exported(run, tmp_path / "empty")) == 4


def test_an_export_that_breaks_off_leaves_nothing_and_one_that_was_killed_is_begun_again(run, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    output, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "_header", disk_full)
        with pytest.raises(ValueError, match=r"out was not written: .*No space left on device; make room"):
            exported(run, output)
    assert not output.exists() and not partial.exists()
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (partial / "lock").touch()
    exported(run, output)
    assert not partial.exists()
    assert sorted(path.name for path in output.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_disk_without_room_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    with pytest.raises(ValueError, match=r"0\.07 GB will be written and 0\.01 GB are free; make room.*--dtype=bfloat16"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_the_name_of_an_unfinished_export_is_emptied_only_if_an_export_made_it(run, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"out\.partial has files in it that no export made, .*; move it away, or give another --output"):
        exported(run, tmp_path / "out")
    assert (partial / "thesis.tex").read_text() == "years of work" and not (tmp_path / "out").exists()
    (partial / "lock").touch()  # as an export that was killed leaves it
    exported(run, tmp_path / "out")
    assert not partial.exists() and not (tmp_path / "out/thesis.tex").exists()


def test_a_second_export_to_the_same_place_is_refused(run, tmp_path):
    with (
        hf_export.written_whole(tmp_path / "out", 0),
        pytest.raises(ValueError, match="being worked on by another process"),
    ):
        exported(run, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--workdir=missing", "--output=out"], 1, "error: --workdir missing: there is no config.json"),
        (["--workdir=missing"], 2, "--output"),
        (["--workdir=missing", "--output=out", "--dtype=float8"], 2, "float8"),
        (["--workdir=missing", "--output=out", "--shard-gb=0"], 2, "shard-gb is 0.0, but it is a size"),
        (["--workdir=missing", "--output=out", "--shard-gb=inf"], 2, "shard-gb is inf, but it is a size"),
    ],
)
def test_faults_end_the_command_with_a_line_and_an_exit_code(capsys, arguments, code, message):
    with pytest.raises(SystemExit) as stop:
        story.main(arguments)
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
