"""What the warm start learns from."""

import json
from dataclasses import replace

import jax
import pytest
from tiny_config import get_config

from dgpo_jax.build import build_parts
from dgpo_jax.supervised import solved_problems


@pytest.mark.parametrize("sft_data", [False, True])  # True: named in sft.data; False: left to data.train
def test_a_prompt_that_is_too_long_is_dropped_from_the_warm_start_too(tmp_path, sft_data):
    rows = [{"id": name, "problem": text, "answer": "2", "solution": "2"} for name, text in (("short", "1+1"), ("long", "1+1" * 40))]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = get_config()
    config = replace(
        config, data=replace(config.data, train=str(file), too_long="drop"), mesh=replace(config.mesh, data=jax.device_count()),
        sft=replace(config.sft, data=str(file) if sft_data else ""),
    )  # fmt: skip
    stream = solved_problems(config, build_parts(config))
    assert {problem.id for problem in stream.take(0, 6)} == {"short"}
