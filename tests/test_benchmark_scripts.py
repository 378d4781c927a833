"""The scripts of benchmarks/ start and measure what they say; what needs a peer or a GPU is not run here."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as it is for a script there

import tiny_model  # noqa: E402
import turns  # noqa: E402
from turns import Case, Round, Side  # noqa: E402

CASE = Case("try", "sample", prompts=2, samples=3, prompt_tokens=4, new_tokens=5)

# A side that needs no model: "tokens" is the seed, a round of seed 7 fails, and one of seed 8 ends the process.
FAKE = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from turns import serve

def prepare(case, folder):
    print("a library prints to stdout")
    def run(given):
        if given == 7:
            raise ValueError("seven")
        if given == 8:
            os._exit(3)
        return given * case.responses
    return run

serve(prepare, lambda case, seed: seed)
"""


# One device, not the eight of the tests.
ENVIRONMENT = {"PYTHONPATH": str(BENCHMARKS.parent), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run_script(name, *arguments):
    """(exit code, stdout, stderr) of a script, as from the command line."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def fake_side(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    with Side("fake", sys.executable, str(script)) as side:
        yield side


@pytest.mark.parametrize("name", ["against_tunix.py", "against_torch.py", "decode_ceiling.py", "gpu.py", "growth.py"])
def test_every_script_says_what_it_does(name):
    code, out, err = run_script(name, "--help")
    assert code == 0, err
    assert f"python benchmarks/{name}" in out  # its own command, from the docstring


def test_a_round_is_timed_in_the_other_process_and_counts_what_it_says(fake_side):
    fake_side.prepare(CASE, Path("."))
    one = fake_side.round(CASE, 4)
    assert one.tokens == 4 * 6  # 2 prompts x 3 samples
    assert 0 < one.seconds < 1
    assert 0 <= one.processor < 1
    fake_side.forget(CASE)
    with pytest.raises(RuntimeError, match="KeyError"):  # nothing is left of it
        fake_side.round(CASE, 4)


def test_a_side_that_fails_or_dies_is_named_with_its_reason(fake_side):
    fake_side.prepare(CASE, Path("."))
    with pytest.raises(RuntimeError, match="fake: ValueError: seven"):
        fake_side.round(CASE, 7)
    assert fake_side.round(CASE, 1).tokens == 6  # a failed round does not end it
    with pytest.raises(RuntimeError, match="fake: it ended with code 3"):
        fake_side.round(CASE, 8)


def test_sides_take_turns_and_neither_is_always_first():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def round(self, case, seed):
            calls.append((self.name, seed))
            return Round(1.0, seed)

    results = turns.take_turns([Recorder("a"), Recorder("b")], CASE, 3)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [[one.tokens for one in side] for side in results] == [[0, 1, 2], [0, 1, 2]]  # by side, in the order of rounds


def test_a_ratio_is_of_tokens_per_second_round_by_round():
    ours = [Round(1.0, 100, 2.0), Round(2.0, 400, 2.0), Round(1.0, 90, 1.0)]  # 100, 200, 90 tokens/s
    peer = [Round(2.0, 100, 2.0), Round(2.0, 100, 4.0), Round(3.0, 90, 5.0)]  # 50, 50, 30: ratios 2, 4, 3
    line = turns.row(CASE._replace(target=1.5), ours, peer)
    # by processor time: 50 / 50, 200 / 25, 90 / 18
    assert line == "| try | 100 (1.00) | 50 (2.00) | 3.00 (2.00 to 4.00) | 5.00 (1.00 to 8.00) | 1.5 |"


def test_cases_are_chosen_by_name_and_a_wrong_name_is_refused():
    from against_tunix import CASES, choose

    assert choose(CASES, "") == CASES
    assert [case.kind for case in choose(CASES, "iteration,fixed")] == ["sample", "iteration"]
    with pytest.raises(SystemExit, match="no case 'fixd'"):
        choose(CASES, "fixd")


@pytest.mark.parametrize("stop", [
    1 / 56,  # the mean length of the comparisons
    0.0,  # never
])  # fmt: skip
def test_the_chance_of_the_stop_token_is_in_the_weights(stop, tmp_path):
    from dgpo_jax.config import ModelConfig
    from dgpo_jax.models import Model, config_from_folder, load_parameters

    folder = tiny_model.write_folder(tmp_path, stop)
    model = Model(ModelConfig(**config_from_folder(folder), dtype="float32"))
    params = load_parameters(folder, model.config)
    tokens = np.random.default_rng(0).integers(2, tiny_model.VOCABULARY, (2, 32)).astype(np.int32)
    position = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    hidden = jax.jit(model.hidden)(params, tokens, np.ones_like(tokens), position)
    chances = np.asarray(jax.nn.softmax(hidden @ model.unembedding(params), axis=-1))
    assert chances[..., tiny_model.STOP] == pytest.approx(stop, rel=0.1, abs=1e-10)  # at every token alike
    assert chances[..., tiny_model.PAD].max() < 1e-10  # padding is how a response's end is recognised


def test_prompts_differ_by_seed_and_have_the_asked_for_tokens():
    texts = tiny_model.prompts(CASE, 0)
    assert [len(text.split()) for text in texts] == [4, 4]
    assert texts == tiny_model.prompts(CASE, 0) != tiny_model.prompts(CASE, 1)


@pytest.mark.parametrize("text, expected", [
    ("4 12", 8 / 4096),
    ("4 12 <stop>", 8 / 4096),  # some trainers keep it in the text
    ("", 0.0),  # stopped at once
])  # fmt: skip
def test_the_reward_is_the_mean_number(text, expected):
    assert tiny_model.reward(text) == expected


def test_our_side_does_whole_iterations(tmp_path):
    folder = tiny_model.write_folder(tmp_path, 0.0, layers=1, width=128)
    case = Case("mini", "iteration", prompts=2, samples=2, prompt_tokens=4, new_tokens=4)
    with Side("ours", sys.executable, "side_ours.py", ENVIRONMENT) as side:
        side.prepare(case, folder)
        assert side.round(case, 0).tokens == 2 * 2 * 4  # nothing stops


def test_the_decoding_ceiling_is_a_share_of_measured_rates(capsys):
    import decode_ceiling

    decode_ceiling.main(batch=8, prompt_tokens=4, new_tokens=4, rounds=1, models=["tiny"], size=64)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny"))
    assert "5.9 M" in line
    assert line.count("%") == 3


def test_bytes_of_a_step_are_those_of_the_shapes():
    import decode_ceiling

    tiny = decode_ceiling.MODELS["tiny"]
    layers = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 1024 + (256 + 2 * 64) + 2 * 256)  # q and o, k and v, mlp, biases, norms
    assert decode_ceiling.weight_bytes(tiny) == 4 * (layers + 256 + 256 * 4096)  # final norm, output matrix; not the embedding
    assert decode_ceiling.cache_bytes(tiny, [3, 5]) == 4 * 2 * 4 * 2 * 32 * 8  # f32, keys and values, layers, heads, width, tokens


def test_the_gpu_script_runs_with_tiny_sizes_on_a_cpu():
    code, out, err = run_script("gpu.py", "--model=tiny", "--decode=4x32", "--update=2x64", "--steps=8", "--rounds=1", "--torch=no")
    assert code == 0, err
    decode, update = (line.split("|")[2:4] for line in out.splitlines() if line.startswith(("| decode 4 x 32", "| update 2 x 64")))
    assert float(decode[0]) > 0, out
    assert "% of the bandwidth" in decode[1]
    assert float(update[0]) > 0, out
    assert "% of the matrix-product rate" in update[1]


def test_the_gpu_script_refuses_without_a_gpu():
    code, _, err = run_script("gpu.py")
    assert code == 1
    assert "JAX finds no GPU here" in err
    assert "--model=tiny" in err


@pytest.mark.parametrize("own, other, expected", [
    # 64 tokens in 0.5 s; 1e9 bytes at 4e9 bytes/s would take 0.25 s
    ({"seconds": 0.5, "bytes": 1e9}, {"seconds": 1.0}, "| x | 128 | 50 % of the bandwidth | 64 | 2.00 |"),
    # 3e12 operations at 1e13 would take 0.3 s
    ({"seconds": 0.5, "tokens": 1000, "flops": 3e12}, {}, "| x | 2000 | 60 % of the matrix-product rate | - | - |"),
    ({"failed": "out of memory"}, {"seconds": 1.0}, "| x | out of memory | - | 64 | - |"),
])  # fmt: skip
def test_a_line_of_the_gpu_table_is_worked_out_by_hand(own, other, expected):
    import gpu

    assert gpu.line("x", 64, own, other, {"bandwidth": 4e9, "rate": 1e13}) == expected


def test_what_does_not_fit_is_said_and_the_rest_measured():
    import gpu

    def measure(number):
        if number > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED:\n  out of memory")
        return {"seconds": number}

    assert gpu.attempt(measure, 1) == {"seconds": 1}
    assert gpu.attempt(measure, 2) == {"failed": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}


def test_growth_is_drawn_with_a_panel_for_each_axis(tmp_path):
    import growth

    growth.draw({"one": ([1, 2], [[1.0, 1.2], [2.0, 2.1]]), "two": ([4], [[3.0]])}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert growth.growth([Round(9.0, 1, 3.0), Round(9.0, 1, 2.0)], [Round(9.0, 1, 1.0), Round(9.0, 1, 4.0)]) == [3.0, 0.5]


def test_growth_starts_from_the_same_base_on_every_axis():
    import growth

    bases = {axis: [point for point in points if point == growth.Point(point.value, growth.BASE)] for axis, (_, points) in growth.AXES.items()}
    assert all(len(found) == 1 for found in bases.values()), bases  # each axis has it once, so that axes can be compared


def test_tunix_is_installed_once_and_again_after_an_interruption(tmp_path, monkeypatch):
    made, asked = [], []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(turns.venv, "create", lambda folder, **_: (made.append(folder), folder.mkdir(parents=True, exist_ok=True)))
    monkeypatch.setattr(turns.subprocess, "run", lambda command, **_: asked.append(command[-1]))
    python = turns.environment("x", ["pinned==1"])
    assert python == str(tmp_path / "dgpo_jax" / "benchmarks" / "x" / "bin" / "python")
    assert asked == ["pinned==1"]
    turns.environment("x", ["pinned==1"])
    assert len(made) == 1
    (tmp_path / "dgpo_jax" / "benchmarks" / "x" / "complete").unlink()  # as if pip had been killed
    turns.environment("x", ["pinned==1"])
    assert len(made) == 2


def test_the_comparisons_take_an_interpreter_instead_of_installing(monkeypatch):
    import against_tunix

    monkeypatch.setattr(sys, "argv", ["against_tunix.py", "--python=/some/python", "--rounds=3"])
    arguments = against_tunix.read_arguments("description", "tunix")
    assert arguments == argparse.Namespace(rounds=3, cases="", python="/some/python")
