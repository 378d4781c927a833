"""A source of problems made into one to train on: deduplicated, free of benchmark problems, short enough, checkable,
of the right difficulty for a model.

    python -m dgpo_jax.prepare --config=configs/qwen_7b.py --output=prepared.jsonl --config.prepare.against=all
    python -m dgpo_jax.train --config=configs/qwen_7b.py --config.data.train=prepared.jsonl

What is left out is set under `prepare`, docs/preparation.md says what the papers do. The pass rate is measured only if
prepare.pass_above or prepare.pass_below is set: eval.samples responses to each problem, by model.path or --checkpoint.
Killed at any moment, the same command goes on; run twice, it gives the same files. An output from before is kept as
prepared.jsonl.before until the new one is there.

    prepared.jsonl              the problems, with pass_rate where it was measured
    prepared.report.md, .json   what each step dropped, with examples, lengths, pass rates
    prepared.dropped.jsonl      every dropped problem: id, step, reason
    prepared.samples/           the model's responses (another place with --workdir)
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgpo_jax.build import Actor, build_actor, build_checkers, build_tokenizer, load, make_decode_params
from dgpo_jax.config import Config
from dgpo_jax.data.benchmarks import parse_sets
from dgpo_jax.data.problems import fingerprint, source_files
from dgpo_jax.data.prompts import Template
from dgpo_jax.evaluation import protocol as protocols
from dgpo_jax.evaluation.generations import count_done
from dgpo_jax.evaluation.protocol import Asked, Weights
from dgpo_jax.evaluation.sampling import generate_set, make_round
from dgpo_jax.files import alone_in
from dgpo_jax.metrics import progress, write_lines
from dgpo_jax.models import resolve_folder
from dgpo_jax.preparation.report import NOT_COMPARED, make_report, report_paths, write_report
from dgpo_jax.preparation.steps import Step, decontaminate, deduplicate, drop_long, drop_unparsable, keep_between
from dgpo_jax.rewarding import graded
from dgpo_jax.session import run_command, say, say_prompt
from dgpo_jax.types import Problem

BEFORE = ".before"  # ends the name of an output of another day, until there is a new one


@dataclass(frozen=True)
class Options:
    """What the command line has besides the config."""

    output: str = ""  # the .jsonl file to write, such as prepared.jsonl
    checkpoint: str = ""  # a run, or one of its checkpoints, to measure pass rates with; '' = model.path


def prepare(config: Config, workdir: Path | None, options: Options) -> dict:
    """Prepares config.data.train.

    Returns:
        The report, as in the JSON file.
    Raises:
        ValueError: settings, source, benchmarks or weights do not fit, or nothing is left.
    """
    # Act 1, what can go wrong cheaply: names, files, tokenizer, model; no weights are read yet.
    output = check_output(config, workdir, options)
    asker = find_asker(config, options)
    tokenizer = asker.actor.tokenizer if asker else build_tokenizer(config, find_folder(config))
    template = Template(config.data.template, config.data.system, config.data.instruction)
    benchmarks = {name: load(config.data, source, config.seed) for name, source in parse_sets(config.prepare.against)}
    source = load(config.data, config.data.train, config.seed)
    say(f"{config.data.train}: {len(source)} problems")
    if asker:
        say_prompt(source[0], template, tokenizer)
    if not benchmarks:
        say(f"  {NOT_COMPARED}")

    # Act 2, the steps, the cheapest first: what one drops the next need not look at.
    problems: Sequence[Problem] = source
    steps: list[Step] = []

    def take(result: tuple[list[Problem], Step]) -> list[Problem]:
        kept, step = result
        steps.append(step)
        say(f"  {step.name:<14} {step.before:>8} in {len(step.drops):>8} dropped {step.kept:>8} out")
        return kept

    if config.prepare.deduplicate:
        problems = take(deduplicate(problems))
    if benchmarks:
        with progress("decontaminating", len(problems)) as advance:
            problems = take(decontaminate(problems, benchmarks, config.prepare.ngram, advance))
    with progress("counting tokens", len(problems)) as advance:
        limits = config.rollout.max_prompt, config.prepare.max_solution
        problems = take(drop_long(problems, tokenizer, template, *limits, advance))
    if config.prepare.parsable:
        with progress("reading answers", len(problems)) as advance:
            problems = take(drop_unparsable(problems, config, advance))
    rate_of, measured = {}, {}
    if asker and problems:
        rates, measured = measure_pass_rates(config, asker, problems, workdir or samples_folder(output))
        rate_of = {problem.id: rate for problem, rate in zip(problems, rates, strict=True)}
        bounds = config.prepare.pass_above, config.prepare.pass_below
        problems = take(keep_between(problems, rates, *bounds, config.eval.samples))

    # Act 3, files: the report first, so that an output always has one, and never that of another.
    before = output.with_name(output.name + BEFORE)
    if output.exists():
        os.replace(output, before)
    report = make_report(describe_settings(config, measured), config.data.train, source, problems, steps)
    paths = write_report(output, report, steps)
    if not problems:
        raise ValueError(
            f"no problem is left of {len(source)}, {output} was not written; {paths['report.md']} says why."
            + (f" What was there is {before} now." if before.exists() else "")
        )
    rates_written = [{"pass_rate": rate_of[problem.id]} if rate_of else {} for problem in problems]
    write_lines(output, [problem._asdict() | rate for problem, rate in zip(problems, rates_written, strict=True)])
    before.unlink(missing_ok=True)
    say(f"problems     {output}\nreport       {paths['report.md']}\ndropped      {paths['dropped.jsonl']}")
    say(f"to train     python -m dgpo_jax.train --config=... {' '.join(train_flags(config, output))}")
    return report


def train_flags(config: Config, output: Path) -> list[str]:
    """What to add to a training command: the output has our own names of fields, whatever those of the source were."""
    flags = [f"--config.data.train={shlex.quote(str(output))}"]
    for name in ("problem", "answer"):
        if getattr(config.data, f"{name}_field") != name:
            flags.append(f"--config.data.{name}_field={name}")
    return flags


class Asker(NamedTuple):
    """Who pass rates are measured of."""

    actor: Actor
    weights: Weights


def find_asker(config: Config, options: Options) -> Asker | None:
    """None if no pass rates are asked for.

    Raises:
        ValueError: settings, devices or weights do not fit.
    """
    if config.prepare.pass_above is None and config.prepare.pass_below is None:
        if options.checkpoint:
            raise ValueError(
                f"--checkpoint is {options.checkpoint!r}, but no pass rate is measured; set prepare.pass_above or"
                " prepare.pass_below, or leave it out."
            )
        return None
    if not config.eval.samples:
        raise ValueError(
            "eval.samples is 0, so there is no pass rate to filter by; give the number of responses per problem."
        )
    actor = build_actor(config)
    return Asker(actor, protocols.find_weights(config, actor, options.checkpoint))


def find_folder(config: Config) -> str:
    """The model's folder, where it has one; for its tokenizer."""
    return str(resolve_folder(config.model.path)) if config.model.path else ""


def samples_folder(output: Path) -> Path:
    """Where the model's responses are kept, unless --workdir says otherwise."""
    return output.with_suffix(".samples")


def check_output(config: Config, workdir: Path | None, options: Options) -> Path:
    """The output's path, if it and what stands beside it can be written without harm."""
    output = Path(options.output)
    if output.suffix != ".jsonl":
        raise ValueError(
            f"--output is {options.output!r}, but problems are written as .jsonl; give --output=prepared.jsonl."
        )
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder, but problems are written to a file; give another name.")
    refuse_sources(config, output, workdir or samples_folder(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror}; choose another place.") from None
    return output


def refuse_sources(config: Config, output: Path, samples: Path) -> None:
    """Raises ValueError if a file that is read is one of those that will be written, or lies among the responses."""
    written = [output, output.with_name(output.name + BEFORE), *report_paths(output).values()]
    places = {path.resolve() for path in written}
    for source in [config.data.train, *(source for _, source in parse_sets(config.prepare.against))]:
        for path in source_files(source):
            if path.resolve() in places:
                raise ValueError(
                    f"--output {output}: {path} is what is read, and would be written over; give another name, so that it can be"
                    " read again."
                )
            if path.resolve().is_relative_to((samples / "generations").resolve()):
                raise ValueError(f"{path} is what is read, and {samples} is for responses; give another --output or --workdir.")


def measure_pass_rates(
    config: Config, asker: Asker, problems: Sequence[Problem], workdir: Path
) -> tuple[list[float], dict]:
    """The share of right responses to each problem; of graded ones the mean grade, under code.grade=soft.

    Responses are kept under the workdir: those that are there already are not sampled again.

    Returns:
        (a rate for every problem, what the rates depend on).
    Raises:
        ValueError: the weights do not fit the model, or the workdir holds responses sampled or judged otherwise.
    """
    config = replace(config, eval=replace(config.eval, greedy=False))
    actor, weights = asker
    asked = Asked("train", config.data.train, problems, 0, fingerprint(problems)[:16], len(problems))
    asking = protocols.describe_asking(config, actor, weights, [asked])
    grading = protocols.describe_grading(config, [asked])  # another grader is another rate
    way_on = f"go back to that grading, or give another --workdir (or delete {workdir}), to sample and judge anew"
    path = workdir / "generations" / "train.jsonl"
    with alone_in(workdir):
        protocols.claim(workdir, weights.name, asking, grading, way_on=way_on)
        params = None
        if count_done(path) < len(problems):  # else other bounds are tried on what there is, without weights
            params = make_decode_params(actor)(weights.load(config, actor))
        way = make_round(config, actor, len(problems), config.eval.samples, config.eval.temperature)
        with build_checkers(config, problems) as checkers, progress("measuring pass rates", len(problems)) as advance:
            done = generate_set(path, way, params, problems, checkers, config.seed, advance)

    rates = [float(np.mean([graded(config, one.verdict) for one in responses])) for _, responses in done]
    return rates, {"by": weights.name} | asking | {"graded by": grading}


def describe_settings(config: Config, measured: dict) -> dict:
    """What the output depends on, for the report.

    Args:
        measured: what the pass rates depend on; empty where there are none.
    """
    return {
        "data.train": config.data.train,
        **{f"prepare.{name}": value for name, value in asdict(config.prepare).items()},
        "rollout.max_prompt": config.rollout.max_prompt,
        "tokenizer": config.data.tokenizer or config.model.path,
        "data.template": config.data.template,
        "data.system": config.data.system,
        "data.instruction": config.data.instruction,
        **{f"pass rate: {name}": value for name, value in measured.items()},
    }  # fmt: skip


if __name__ == "__main__":
    run_command("dgpo_jax.prepare", "Problems to train on: filtered, with a report.", prepare, Options)
