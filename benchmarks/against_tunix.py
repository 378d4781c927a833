"""Sampling and a whole GRPO iteration against tunix 0.1.7, with the same weights on the same CPU.

    python benchmarks/against_tunix.py [--rounds=9] [--cases=fixed,geometric] [--python=.venv-tunix/bin/python]

Takes about ten minutes on two cores, and on first use as long as installing google-tunix takes (into the user's cache folder),
unless --python names an interpreter that has it. Each side is a process of its own; they run one round at a time in turns, with
everything compiled before. Both read one Hugging Face folder (tiny_model.py), start from texts and end with texts.

"geometric" means that every token is the stop token with a chance of 1 in 56: this is in the weights, so both sides draw
lengths from the same distribution. Their draws are not the same ones, which is why a ratio compares tokens per second, and why
there are several rounds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import tiny_model
from turns import HERE, Case, Side, compare, environment

MEAN = 56  # tokens of a response, where lengths are geometric
CASES = [
    Case("fixed: sampler, 32 x 64+64, tunix's cache 128", "sample", 32, 1, 64, 64, target=1.5),
    Case("fixed-1024: the same, tunix's cache 1024", "sample", 32, 1, 64, 64, cache=1024, target=3),
    Case("geometric: sampler, 32 x 64+256, mean 56", "sample", 32, 1, 64, 256, stop=1 / MEAN, target=8),
    Case("geometric-group: sampler, 16 prompts x 8 samples of 64+256, mean 56", "sample", 16, 8, 64, 256, stop=1 / MEAN, target=8),
    Case("prefill: sampler, 8 prompts of 256 x 8 samples of 8", "sample", 8, 8, 256, 8, target=10),
    Case("iteration: GRPO 4 x 8 at 64+64", "iteration", 4, 8, 64, 64, target=1.5),
    Case("iteration-geometric: GRPO 4 x 8 at 64+256, mean 56", "iteration", 4, 8, 64, 256, stop=1 / MEAN, target=4),
]


def choose(cases: list[Case], names: str) -> list[Case]:
    """Those whose names, up to the colon, are in the list; all for ''.

    Raises:
        SystemExit: a name that is none of them.
    """
    known = {case.name.partition(":")[0]: case for case in cases}
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in known:
            sys.exit(f"--cases: no case {name!r}; there are {', '.join(known)}")
    return [case for name, case in known.items() if name in wanted or not wanted]


def read_arguments(description: str, peer: str) -> argparse.Namespace:
    """What both comparisons can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each side in each case")
    parser.add_argument("--cases", default="", help="names up to the colon, by commas; all if empty")
    parser.add_argument("--python", default="", help=f"an interpreter that has {peer}; if empty, one is installed")
    return parser.parse_args()


def run(arguments: argparse.Namespace, cases: list[Case], peer: str, script: str, packages: list[str], ours: str) -> None:
    """Measures the chosen cases and prints the table."""
    chosen = choose(cases, arguments.cases)
    python = arguments.python or environment(peer.replace(" ", "-"), packages)
    root = {"PYTHONPATH": str(HERE.parent)}
    cpu = {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as temporary, Side("ours", ours, "side_ours.py", root | cpu) as own, Side(peer, python, script, cpu) as other:
        folders = {stop: tiny_model.write_folder(Path(temporary) / f"stop{stop:.4f}", stop) for stop in {case.stop for case in chosen}}
        compare(own, other, [(case, folders[case.stop]) for case in chosen], arguments.rounds)


if __name__ == "__main__":
    run(read_arguments(__doc__, "google-tunix"), CASES, "tunix 0.1.7", "side_tunix.py", ["google-tunix==0.1.7"], sys.executable)
