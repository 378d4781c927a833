"""Where the time of a run went, from its own metrics.

    python benchmarks/time_split.py WORKDIR

Prints one Markdown table of phases (seconds, share of the sum) and one of speeds (medians over iterations, without the
first, which compiles what was not compiled ahead). Compilation inside the phases is listed apart.
"""

import json
import statistics
import sys
from pathlib import Path

PHASES = ("compile_ahead", "rollout", "verify", "update", "eval")
SPEEDS = (
    "speed/rollout_tokens_per_second_per_device", "speed/rollout_tflops_per_device", "speed/rollout_mfu", "rollout/slots_live",
    "speed/update_tokens_per_second_per_device", "speed/update_tflops_per_device", "speed/update_mfu", "update/packing_efficiency",
    "time/iteration",
)  # fmt: skip


def main(workdir: Path) -> None:
    """Reads workdir/metrics.jsonl and workdir/sft/metrics.jsonl."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    warm_start = workdir / "sft" / "metrics.jsonl"
    sft = [json.loads(line) for line in warm_start.read_text().splitlines()] if warm_start.exists() else []
    seconds = {phase: sum(row.get(f"time/{phase}", 0.0) for row in rows) for phase in PHASES}
    between = [end["update"] - begin["update"] for begin, end in zip([{"update": 0}, *sft], sft, strict=False)]
    seconds["warm start"] = sum(row["time/update"] * count for row, count in zip(sft, between, strict=True))
    total = sum(seconds.values())
    print("| phase | seconds | share |\n|---|---|---|")
    for phase, value in seconds.items():
        print(f"| {phase} | {value:.1f} | {100 * value / total:.0f} % |")
    print(f"| all of these | {total:.1f} | 100 % |")
    compiling = sum(row.get("time/compile", 0.0) for row in rows)
    print(f"| compilation, inside rollout, update and eval | {compiling:.1f} | {100 * compiling / total:.0f} % |")
    print("\n| speed | median |\n|---|---|")
    for name in SPEEDS:
        values = [row[name] for row in rows[2:] if row.get(name) is not None]
        if values:
            print(f"| {name} | {statistics.median(values):.4g} |")
    for name in ("policy/first_ratio_error", "gap/mean", "gap/max", "memory/host_peak_gib", "memory/device_peak_gib"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            print(f"| {name}, largest | {max(values):.3g} |")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        sys.exit("usage: python benchmarks/time_split.py WORKDIR, a folder with metrics.jsonl")
    main(Path(sys.argv[1]))
