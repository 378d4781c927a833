"""Two folders of one model are told apart, and one is known again, without reading all of it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from dgpo_jax.models import files
from dgpo_jax.models.files import fingerprint_folder

GOLDEN = Path(__file__).parent / "golden/qwen2_tied"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Qwen2, with a tokenizer and a chat template that nobody loads."""
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_copy_has_the_same_fingerprint_whatever_else_lies_there(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("no file of a model")
    (copy / "checkpoint-7.json").mkdir()
    assert fingerprint_folder(copy) == fingerprint_folder(folder)
    assert list(fingerprint_folder(folder)) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads(json.dumps(fingerprint_folder(folder))) == fingerprint_folder(folder)  # a checkpoint keeps it as JSON


def test_a_link_is_what_it_leads_to(folder, tmp_path):
    linked = tmp_path / "snapshot"  # as the hub's cache lays a model out
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert fingerprint_folder(linked) == fingerprint_folder(folder)


def change_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).flat[7] += 1
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, name", [
    (change_a_weight, "model.safetensors"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ massages }}"), "chat_template.jinja"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0, "a": 1}}}'), "tokenizer.json"),
    (lambda folder: (folder / "generation_config.json").write_text("{}"), "generation_config.json"),  # it may name stop tokens
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
])
def test_each_change_is_seen_and_named(folder, change, name):
    before = fingerprint_folder(folder)
    change(folder)
    after = fingerprint_folder(folder)
    assert [name] == [one for one in before.keys() | after.keys() if before.get(one) != after.get(one)]


@pytest.fixture
def large(folder, monkeypatch):
    """A file of weights that is not read whole: a header of 28 bytes behind its length of 8, then zeros up to 2000."""
    monkeypatch.setattr(files, "WHOLE", 1000)
    monkeypatch.setattr(files, "BLOCKS", 3)
    monkeypatch.setattr(files, "BLOCK", 10)  # at bytes 0, 995 and 1990
    path = folder / "model.safetensors"
    header = b'{"a":{"dtype":"BF16"}}      '
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2000 - 8 - len(header)))
    return path


@pytest.mark.parametrize("place, seen", [
    (22, True),  # in the header, behind the first block: a dtype
    (1000, True),  # in the middle block
    (1999, True),  # the last byte
    (500, False),  # between blocks: the price of not reading all of it
])
def test_of_a_large_file_of_weights_header_and_blocks_are_looked_at(large, place, seen):
    before, content = fingerprint_folder(large.parent), bytearray(large.read_bytes())
    content[place] ^= 1
    large.write_bytes(content)
    assert (fingerprint_folder(large.parent) != before) == seen


def test_of_a_large_file_the_size_counts_too(large):
    before = fingerprint_folder(large.parent)["model.safetensors"]
    large.write_bytes(large.read_bytes() + b"x")
    assert before["bytes"] == 2000 and fingerprint_folder(large.parent)["model.safetensors"]["bytes"] == 2001


def test_a_large_file_whose_header_is_nonsense_is_read_no_further_than_it_goes(large):
    large.write_bytes(b"\xff" * 2000)
    assert fingerprint_folder(large.parent)["model.safetensors"]["bytes"] == 2000
