"""Hugging Face folders are read as transformers reads them, or refused with a reason."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgpo_jax.config import ModelConfig
from dgpo_jax.models import config_from_folder, load_parameters, load_pretrained
from dgpo_jax.models.hf import INDEX
from dgpo_jax.sharding import make_mesh

# Made by golden/make_models.py with torch 2.13.0 and transformers 5.23.0.
GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2", "qwen2_tied", "qwen2_yarn", "qwen3", "llama")  # f32 in 3 files, then bf16, bf16, bf16 and f16


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def folder(tmp_path):
    """A copy of the tied Qwen2 to damage."""
    return shutil.copytree(GOLDEN / "qwen2_tied", tmp_path / "model")


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, bound", [
    ("float32", 1e-4),  # 6e-6 measured
    ("bfloat16", 0.3),  # 0.15 measured, of logits up to 4.5; weights of std 0.2 are harsher than trained ones
])
def test_logits_agree_with_transformers(name, dtype, bound):
    golden = np.load(GOLDEN / name / "logits.npz")
    model, params = load_pretrained(GOLDEN / name, dtype=dtype)
    logits = model.logits(params, golden["tokens"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden["logits"], atol=bound)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_parameters_arrive_in_their_shardings_with_the_same_values(name):
    config = ModelConfig(**config_from_folder(GOLDEN / name))
    alone, sharded = load_parameters(GOLDEN / name, config), load_parameters(GOLDEN / name, config, make_mesh(1, 4, 2))
    jax.tree.map(np.testing.assert_array_equal, sharded, alone)
    output = sharded["layers"]["attention"]["output"]["kernel"]  # [L, K, M, H, D]: both its split axes are cut
    assert output.addressable_shards[0].data.shape == (2, 1, 2, 8, 8)


def test_the_query_head_of_hugging_face_is_key_head_times_queries_plus_query():
    config = ModelConfig(**config_from_folder(GOLDEN / "qwen2_tied"))
    params = load_parameters(GOLDEN / "qwen2_tied", config)
    matrix = load_file(GOLDEN / "qwen2_tied" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    head = 1 * 2 + 0  # key head 1, its query 0
    expected = matrix[head * 8 : (head + 1) * 8].T.astype(np.float32)  # [D, H]
    np.testing.assert_array_equal(params["layers"]["attention"]["query"]["kernel"][1, :, 1, 0], expected)


def test_parameters_can_be_kept_in_the_dtype_of_the_file():
    config = ModelConfig(**config_from_folder(GOLDEN / "qwen2_tied"))
    params = load_parameters(GOLDEN / "qwen2_tied", config, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_settings_of_both_generations_of_config_files_are_read(folder):
    new = config_from_folder(GOLDEN / "qwen2_yarn")
    assert (new["rope_scaling"], new["rope_theta"], new["rope_factor"], new["rope_original_length"]) == ("yarn", 100, 4, 8)
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 7}
    change_config(folder, rope_parameters=None, **old)
    fields = config_from_folder(folder, dtype="bfloat16")
    assert (fields["rope_theta"], fields["rope_factor"], fields["rope_original_length"]) == (5.0, 2.0, 7)
    assert fields["dtype"] == "bfloat16"
    assert config_from_folder(GOLDEN / "llama")["rope_theta"] == 1000.0


@pytest.mark.parametrize("change, message", [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not covered; choose one of Qwen2ForCausalLM"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' is not covered"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast=16 is not covered, only 32"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not covered, only False"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has .*sliding_attention"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not covered, only 'silu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.*is not covered"),
    ({"hidden_size": None}, "hidden_size=None; it must be a positive whole number"),
    ({"hidden_size": True}, "hidden_size=True; it must be a positive whole number"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000, and no known model has more than 1000"),
    ({"vocab_size": 2**25}, "vocab_size=33554432, and no known model has more than 16777216"),
    ({"num_key_value_heads": 3}, "config.json: model.heads is 4, but key heads are shared evenly and there are 3"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'; it must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; it must be a positive number"),
    ({"initializer_range": -0.1}, "initializer_range=-0.1; it must be a positive number"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0; it must be a positive number"),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\]; it must be an object"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "2", "original_max_position_embeddings": 8}}, "factor='2'; it must be a positive number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; it must be true or false"),  # which Python takes for True
    ({"layer_types": [["full_attention"]]}, "layer_types has .*only full_attention"),
    ({"architectures": [["LlamaForCausalLM"]]}, "is not covered; choose one of Qwen2ForCausalLM"),
])
def test_a_config_that_would_be_computed_differently_is_refused(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        config_from_folder(folder)


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def add_bias(tensors):
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(4, np.float32)


def misshape(tensors):
    tensors["model.norm.weight"] = np.zeros(31, np.float32)


def quantise(tensors):
    tensors["model.norm.weight"] = np.zeros(32, np.int8)


@pytest.mark.parametrize("change, message", [
    (drop_norm, "lacks model.norm.weight"),
    (add_bias, "holds model.layers.0.mlp.up_proj.bias, which this model does not have"),
    (misshape, r"model.norm.weight has shape \(31,\) and config.json says \(32,\)"),
    (quantise, "model.norm.weight has dtype I8"),
])
def test_files_that_do_not_match_the_config_are_refused_by_name(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(folder)
    assert len(str(error.value)) < 400


def test_a_copy_of_the_tied_matrix_in_the_file_is_allowed(folder):
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    _, params = load_pretrained(folder)
    assert "unembed" not in params


def test_missing_and_broken_files_are_refused(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="not a folder here, and the Hugging Face hub did not give it"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name, message", [
    ("config.json", r"config.json: cannot be read \(Not a regular file\)"),
    ("model.safetensors", "model.safetensors: not a complete safetensors file .*Not a regular file"),
])  # fmt: skip
def test_a_pipe_in_a_folder_is_not_waited_for(folder, name, message, pipe):
    pipe(folder / name)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "initializer_range"])
def test_a_number_that_float32_rounds_to_zero_is_refused(folder, name):
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(settings | {name: 1e-300}))
    with pytest.raises(ValueError, match=f"{name}=1e-300; it must be a positive number that float32 holds"):
        config_from_folder(folder)


@pytest.mark.parametrize("content, message", [
    (b"[]", r"config.json: holds \[\] and no object"),
    (b"\xff\xfe", "config.json: not JSON"),
    (b"[" * 100_000, "config.json: not JSON"),
    (b'{"hidden_size": ' + b"1" * 5000 + b"}", "config.json: not JSON .*4300 digits"),
])  # fmt: skip
def test_a_config_that_is_no_object_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        config_from_folder(folder)


@pytest.mark.parametrize("listed, message", [
    ("../other/model.safetensors", "is not a file of its own folder"),  # an index was written by others
    ("/etc/passwd", "is not a file of its own folder"),
    ("a\nb", "is not a file of its own folder"),
    (3, "its weight_map is not an object of tensor and file names"),
    ("elsewhere.safetensors", "elsewhere.safetensors is missing; download"),
])  # fmt: skip
def test_an_index_that_names_no_file_of_the_folder_is_refused(tmp_path, listed, message):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = listed
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "model")
    files = sorted(folder.glob("*.safetensors"))
    save_file(load_file(files[0]) | {"model.norm.weight": np.zeros(32, np.float32)}, files[0])
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight, which another file holds too"):
        load_pretrained(folder)


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
@pytest.mark.parametrize("name, value", [
    ("model.layers.1.self_attn.q_proj.weight", np.nan), ("model.norm.weight", np.inf), ("model.embed_tokens.weight", -np.inf),
])  # fmt: skip
def test_a_weight_that_is_not_finite_is_refused_by_name(folder, name, value, mesh):
    def spoil(tensors):
        tensors[name] = np.array(tensors[name], np.float32)
        tensors[name].flat[-1] = value  # on a mesh, in the part of the last device

    change_tensors(folder, spoil)
    with pytest.raises(ValueError, match=f"{name} has 1 values of .* that are NaN or infinite"):
        load_pretrained(folder, mesh and make_mesh(*mesh))


def test_a_name_that_the_hub_cannot_be_asked_for_is_refused_shortly(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"model.path='Qwen/Qwen2.5-1.5B'.*ConnectionError.*check the name and the net"):
        load_pretrained("Qwen/Qwen2.5-1.5B")


def test_left_padded_rows_agree_with_a_live_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3", dtype=torch.float32)
    tokens = np.array([[0, 0, 5, 9, 11], [3, 1, 4, 1, 5]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    position = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = reference(*map(torch.tensor, (tokens, mask)), position_ids=torch.tensor(position)).logits.numpy()
    model, params = load_pretrained(GOLDEN / "qwen3")
    logits = model.logits(params, tokens.astype(np.int32), mask.astype(np.int32))
    np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=1e-4)
