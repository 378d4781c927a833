"""Which configs fit which TPU slices, by the dry run: the table of docs/dryrun.md.

    python benchmarks/fits.py [FOLDER]

Needs libtpu and no TPU. Compiles every program of every pair below, one after the other: about five minutes each on two cores. FOLDER
keeps the figures as JSON, and a pair whose file is there is not compiled again.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
GIB = 2**30

# (config, slice); what is proven to fit.
PAIRS = [
    ("qwen_1p5b_8k_v5e", "v5e:2x4"),
    ("qwen_1p5b_32k_v6e", "v6e:2x4"),
    ("qwen_1p5b_32k_v6e", "v5p:2x2x1"),
    ("qwen_7b_16k_tpu", "v5p:2x2x2"),
    ("qwen_7b_16k_tpu", "v6e:4x4"),
    ("qwen_14b_32k_v5p", "v5p:4x4x4"),
]


def dry_run(config: str, topology: str, path: Path, *more: str) -> dict:
    """The figures of one dry run, from `path` if they are there; those of a config that does not fit too.

    Raises:
        RuntimeError: the dry run found no figures.
    """
    if not path.exists():
        command = [sys.executable, "-m", "dgpo_jax.dryrun", f"--config=configs/{config}.py", f"--topology={topology}", f"--json={path}", *more]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if not path.exists():
            raise RuntimeError(f"{config} on {topology}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(path.read_text())


def row_of(figures: dict) -> str:
    """A line of the table."""
    memory = {program["name"].split()[0]: program["memory_bytes"]["total"] for program in figures["programs"] if "memory_bytes" in program}
    most = max((size, name) for name, size in memory.items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    phases = figures["phase_seconds"]
    cells = [
        figures["config"], f"{figures['topology']} ({figures['hosts']} host{'s' * (figures['hosts'] > 1)})", mesh, str(figures["plan"]["slots"]),
        *(f"{memory[name] / GIB:.1f}" if name in memory else "too large" for name in ("prefill", "decode", "accumulate", "apply")),
        f"{most[0] / GIB:.1f} of {figures['capacity_bytes'] / GIB:.1f}", "yes" if figures["fits"] else "no",
        f"{phases['rollout']:.0f} + {phases['update']:.0f}" if phases else "",
        f"{figures['tokens_per_second_per_device']:.0f}" if phases else "",
        f"{figures['mfu']['update']:.0%}" if phases else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(folder: Path) -> None:
    """Prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = (
        "config", "slice", "mesh", "slots", "prefill, GiB", "decode", "accumulate", "apply", "most", "fits",
        "s an iteration, rollout + updates", "tokens/s per chip", "MFU of updates",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for config, topology in PAIRS:
        print(row_of(dry_run(config, topology, folder / f"{config}.{topology.replace(':', '_')}.json")), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as default:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else default))
