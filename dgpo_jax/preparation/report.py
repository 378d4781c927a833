"""What a preparation did, for people (Markdown) and for programs (JSON).

It holds no time and no date: the same command twice gives the same files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dgpo_jax.data.problem_sets import SETS
from dgpo_jax.data.problems import JoinedProblems, fingerprint
from dgpo_jax.files import write_whole
from dgpo_jax.metrics import write_lines
from dgpo_jax.preparation.steps import Step
from dgpo_jax.types import Problem

NOT_COMPARED = "prepare.against is empty: no problem was compared with those of a benchmark"
BAR = 40  # characters of the longest bar


def report_paths(output: Path) -> dict[str, Path]:
    """Where the report and the list of dropped problems go: beside the output, under its name."""
    return {name: output.with_name(f"{output.stem}.{name}") for name in ("report.md", "report.json", "dropped.jsonl")}


def make_report(
    settings: Mapping[str, object],
    source: str,
    before: Sequence[Problem],
    kept: Sequence[Problem],
    steps: Sequence[Step],
) -> dict:
    """The report as JSON holds it.

    Args:
        source: what data.train names, `before` its problems.
    """
    return {
        "settings": dict(settings),
        "problems": {"before": len(before), "kept": len(kept)},
        "fingerprint": {"before": fingerprint(before), "kept": fingerprint(kept)},
        "steps": [
            {
                "name": step.name, "keeps": step.rule,
                "before": step.before, "dropped": len(step.drops), "kept": step.kept,
                "tables": step.tables, "examples": [drop._asdict() for drop in step.examples],
            }
            for step in steps
        ],
        "sources": describe_sources(source, before, kept),
    }  # fmt: skip


def describe_sources(source: str, before: Sequence[Problem], kept: Sequence[Problem]) -> list[dict]:
    """What became of each part of a source, and what is known of its licence."""
    names = [part.strip() for part in source.split(" + ")]
    parts = before.parts if isinstance(before, JoinedProblems) else [before]
    left = {problem.id for problem in kept}
    return [
        {
            "source": name,
            "before": len(part),
            "kept": sum(problem.id in left for problem in part),
            "licence": find_licence(name),
        }
        for name, part in zip(names, parts, strict=True)
    ]


def find_licence(source: str) -> str:
    """Of one source, not joined."""
    scheme, _, rest = source.partition(":")
    name = rest.partition("/")[0]
    if scheme == "tfds" and name in SETS:
        return SETS[name].licence
    if scheme in ("generated", "builtin", "gym"):
        return "made by a program, no text of others"
    return "not known here; see where the file came from"


def to_markdown(report: dict, name: str) -> str:
    """The report for people.

    Args:
        name: of the output, for the title.
    """
    count, prints = report["problems"], report["fingerprint"]
    share = count["kept"] / max(1, count["before"])
    lines = [
        f"# {name}: {count['kept']} of {count['before']} problems kept ({share:.1%})", "",
        "Fingerprint (SHA-256 of ids, problems, answers, tests, checkers, tolerances):"
        f" `{prints['before'][:16]}` before, `{prints['kept'][:16]}` kept.", "",
        "| step | keeps | in | dropped | out |", "|---|---|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {step['name']} | {_cell(step['keeps'])} | {step['before']} | {step['dropped']} | {step['kept']} |"
        for step in report["steps"]
    ]
    if not report["settings"].get("prepare.against"):
        lines += ["", f"{NOT_COMPARED}."]
    for step in report["steps"]:
        lines += _describe_step(step)
    lines += ["", "## Sources", "", "| source | in | out | licence, which the problems keep |", "|---|---:|---:|---|"]
    lines += [
        f"| {_cell(row['source'])} | {row['before']} | {row['kept']} | {_cell(row['licence'])} |"
        for row in report["sources"]
    ]
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [
        f"| {setting} | {_cell(json.dumps(value, ensure_ascii=False))} |"
        for setting, value in report["settings"].items()
    ]
    return "\n".join(lines) + "\n"


def _describe_step(step):
    if not (step["tables"] or step["examples"]):
        return []
    lines = ["", f"## {step['name'].capitalize()}: {step['dropped']} dropped"]
    for title, rows in step["tables"].items():
        lines += ["", f"{title}:", "", "```", *_bars(rows), "```"]
    if step["examples"]:
        lines += [
            "",
            f"Such as ({len(step['examples'])} of {step['dropped']}, all are in the list of dropped problems):",
            "",
        ]
        lines += [f"- `{_code(drop['id'])}`: {_prose(drop['reason'])}" for drop in step["examples"]]
    return lines


def _bars(rows):
    """One line each: label, number, bar."""
    labels = {_code(label): count for label, count in rows.items()}
    wide, most = max(map(len, labels)), max(1, *labels.values())
    digits = len(str(most))
    return [
        f"{label:<{wide}}  {count:>{digits}}  {'█' * round(BAR * count / most)}".rstrip()
        for label, count in labels.items()
    ]


def _cell(text):
    return _one_line(text).replace("|", "\\|")


def _code(text):
    return _one_line(text).replace("`", "'")


def _prose(text):
    """LaTeX in a reason would be taken for emphasis or formulas; from its first quotation mark on it is code."""
    words, mark, quoted = text.partition('"')
    return f"{_one_line(words)} `{_code(mark + quoted)}`" if mark else _one_line(words)


def _one_line(text):
    return " ".join(str(text).split())


def write_report(output: Path, report: dict, steps: Sequence[Step]) -> dict[str, Path]:
    """Writes the three files beside the output, each whole or not at all; returns where they are."""
    paths = report_paths(output)
    dropped = [{"id": drop.id, "step": step.name, "reason": drop.reason} for step in steps for drop in step.drops]
    write_lines(paths["dropped.jsonl"], dropped)
    write_whole(paths["report.json"], json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(paths["report.md"], to_markdown(report, output.name))
    return paths
