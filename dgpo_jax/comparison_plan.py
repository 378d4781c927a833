"""What a comparison is to run, read from its command line and refused where a run would refuse it."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.config import Config, default_workdir, flatten, parse_command
from dgpo_jax.methods import MethodWord, parse_methods
from dgpo_jax.recipe import resolve

PROGRAM = "dgpo_jax.compare"


class Plan(NamedTuple):
    """Everything the command line says."""

    config: Config  # without method and seed
    methods: list[MethodWord]
    configs: list[Config]  # of each method
    seeds: list[int]
    workdir: Path
    jobs: int  # runs at a time
    report_only: bool
    arguments: list[str]  # that every run is given: --config and the overrides

    def runs(self) -> list["Run"]:
        """By seed first, so that a comparison that was stopped has whole seeds to compare."""
        return [
            Run(method, seed, self.workdir / method.label / f"seed_{seed}")
            for seed in self.seeds
            for method in self.methods
        ]

    def differences(self) -> list[str]:
        """A line for each setting with different values among the runs; a method that does not read one (None) has no value."""
        flat = {method.label: flatten(config) for method, config in zip(self.methods, self.configs, strict=True)}
        lines = []
        for name in flatten(self.config).keys() - {"loss.method"}:
            labels: dict[object, list[str]] = {}
            for label, settings in flat.items():
                if settings[name] is not None:
                    labels.setdefault(settings[name], []).append(label)
            if len(labels) > 1:
                lines.append(f"{name}: " + "; ".join(f"{value} for {', '.join(who)}" for value, who in labels.items()))
        return sorted(lines)

    def warm_start(self, seed: int) -> Path:
        """Where the warm start of a seed is."""
        return self.workdir / "warm_start" / f"seed_{seed}"


class Run(NamedTuple):
    """One method with one seed."""

    method: MethodWord
    seed: int
    workdir: Path


def parse_plan(arguments: Sequence[str]) -> Plan:
    """Reads the command line; everything that a run would refuse is refused here, before any has started.

    Raises:
        SystemExit: with code 2 after a message; with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        f"python -m {PROGRAM}", description="Runs methods x seeds of one config at equal budget and compares them.",
        epilog="Every other --config.NAME=VALUE is for all runs; python -m dgpo_jax.train --help lists them.", allow_abbrev=False,
    )  # fmt: skip
    option = parser.add_argument
    option("--config", metavar="FILE", help="a Python file with get_config(), as for train")
    option(
        "--methods",
        required=True,
        help="such as 'grpo,dgpo,dgpo(n=2,m=2)'; the first is what the others are compared with",
    )
    option("--seeds", required=True, help="such as 0,1,2")
    option(
        "--workdir",
        help="where everything is written; default runs/compare-NAME-HASH, found again by the same settings",
    )
    option("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores; default 1")
    option("--report-only", action="store_true", help="compute nothing, report what is there")
    given, rest = parser.parse_known_args(arguments)
    shared = [f"--config={given.config}", *rest] if given.config else rest
    try:
        check_overrides(rest)
        if given.jobs < 1:
            raise ValueError(f"--jobs is {given.jobs}, but runs have to be run; give at least 1.")
        methods, seeds = parse_methods(given.methods), parse_seeds(given.seeds)
        config = read_config(shared)
        if not config.iterations:
            raise ValueError("iterations is 0, so methods would not differ; give at least 1.")
        configs = [read_config([*shared, *method.arguments(), f"--config.seed={max(seeds)}"]) for method in methods]
        workdir = Path(given.workdir or f"runs/compare-{default_workdir(config).name}")
        if given.report_only and not workdir.is_dir():
            raise ValueError(
                f"there is no comparison in {workdir} to report; give its --workdir, or leave out --report-only."
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return Plan(config, methods, configs, seeds, workdir, given.jobs, given.report_only, shared)


def read_config(arguments: Sequence[str]) -> Config:
    """As `train` reads and resolves it."""
    return resolve(parse_command(arguments, program=PROGRAM, description="")[0])


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuses settings that are not the same for all runs."""
    for name, option in (("loss.method", "--methods"), ("seed", "--seeds")):
        if any(override.partition("=")[0] == f"--config.{name}" for override in overrides):
            raise ValueError(f"--config.{name} is given, but runs differ in it; use {option}.")


def parse_seeds(text: str) -> list[int]:
    """Reads `0,1,2`."""
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,10}", word.strip()) for word in words):
        raise ValueError(f"--seeds is {text!r}, but seeds are whole numbers with commas between them; write 0,1,2.")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds is {text!r}, but a seed twice gives the same run twice; leave one out.")
    return seeds
