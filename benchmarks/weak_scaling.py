"""What a chip does in one microbatch as the slice grows and each chip keeps its share: FLOPs, memory, and bytes over links.

    python benchmarks/weak_scaling.py [FOLDER]

Compiles `accumulate` of configs/qwen_1p5b_8k_v5e.py, weights split over all chips, for slices of 16 to 256 TPU v5e chips; needs libtpu and
no TPU. FOLDER keeps the figures as JSON. FLOPs per chip should stay the same, and so should the bytes: a chip gathers the
whole model whatever its own share of it is.
"""

import sys
import tempfile
from pathlib import Path

from fits import GIB, dry_run

CONFIG = "qwen_1p5b_8k_v5e"
SLICES = ("4x4", "8x8", "16x16")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def main(folder: Path) -> None:
    """Prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("chips", "TFLOP a chip", "GiB a chip", *(f"{kind}, GB a chip" for kind in KINDS), "ms by FLOPs, memory, links")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for shape in SLICES:
        figures = dry_run(CONFIG, f"v5e:{shape}", folder / f"weak.{shape}.json", "--programs=accumulate")
        one = figures["programs"][0]
        cells = [
            str(figures["devices"]), f"{one['flops'] / 1e12:.2f}", f"{one['memory_bytes']['total'] / GIB:.2f}",
            *(f"{one['collective_bytes'].get(kind, 0) / 1e9:.3f}" for kind in KINDS),
            ", ".join(f"{1e3 * one['seconds_by'][rate]:.0f}" for rate in ("flops", "memory", "links")),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as default:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else default))
