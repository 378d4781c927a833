"""Benchmarks: every score with its standard error and the protocol that it holds for.

    python -m dgpo_jax.evaluate --config=configs/eval_smollm2.py
    python -m dgpo_jax.evaluate --config=configs/eval_smollm2.py --checkpoint=runs/smollm2-0123abcd

Read `evaluate` from top to bottom; docs/evaluation.md says what the figures mean.

Which weights, in this order:
    1. the newest sound checkpoint of --checkpoint, a run's workdir, or the very one that is named;
    2. else those of model.path, or random ones.

The workdir is evals/NAME-HASH unless --workdir names another, the hash being of all that settles which responses are
sampled. The same command therefore goes on where it was stopped; done problems are not sampled again, and a kill
changes no file. --regrade samples nothing: it judges the responses that are there with today's grader and
reward.extract.

    WORKDIR/results.md, results.json       what came out
    WORKDIR/generations/SET.jsonl          every sample, and SET.greedy.jsonl the greedy responses: a line per problem
    WORKDIR/disagreements.md               where Math-Verify, if it is installed, judges differently
    WORKDIR/regrade.md                     what --regrade changed
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dgpo_jax.build import Actor, build_actor, build_checkers, make_decode_params
from dgpo_jax.config import Config
from dgpo_jax.evaluation import protocol as protocols
from dgpo_jax.evaluation.differences import Change, Disagreement, disagreement_report, regrade_report
from dgpo_jax.evaluation.generations import count_done, read_generations, rewrite
from dgpo_jax.evaluation.judging import GREEDY, SAMPLES, Answered, Judged, judge
from dgpo_jax.evaluation.protocol import Asked, Weights
from dgpo_jax.evaluation.report import Scored, count_of, score_line, score_set, score_table, to_json, to_markdown
from dgpo_jax.evaluation.sampling import generate_set, make_rounds
from dgpo_jax.files import alone_in, write_whole
from dgpo_jax.metrics import progress
from dgpo_jax.rewarding import graded
from dgpo_jax.rewards import math_verify
from dgpo_jax.rewards.checkers import Checkers
from dgpo_jax.session import run_command, say, say_prompt
from dgpo_jax.types import Problem

BEFORE = ".before"  # ends the name of a file with the verdicts from before a regrade; it is there until that is done
Responses = dict[str, dict[str, Sequence[Answered]]]  # set -> GREEDY, SAMPLES -> its problems


@dataclass(frozen=True)
class Options:
    """Flags beside --config and --workdir."""

    checkpoint: str = ""  # a run's workdir, its checkpoints folder or one iteration_...; '' = the weights of model.path
    regrade: bool = False  # sample nothing, judge the responses in the workdir again, and report what changed


def evaluate(config: Config, workdir: Path | None, options: Options) -> list[Scored]:
    """Answers what has not been answered yet, judges it, and reports.

    Returns:
        The figures of every set; none if it is a regrade of an evaluation that is not finished.
    Raises:
        ValueError: a setting, the data, the weights or the workdir does not fit.
    """
    # Act 1, the protocol: whose weights, which problems, how asked and how judged. No weights are read yet.
    named = protocols.name_sets(config)  # first, since a typing error should not wait for anything
    actor = build_actor(config)
    weights = protocols.find_weights(config, actor, options.checkpoint)
    sets = protocols.load_sets(config, actor, named)
    asking, grading = protocols.describe_asking(config, actor, weights, sets), protocols.describe_grading(config, sets)
    workdir = workdir or protocols.default_workdir(config, asking)
    if options.regrade and not (workdir / protocols.PROTOCOL).exists():
        raise ValueError(
            f"{workdir} holds no responses to judge; give the --workdir of an evaluation, or leave out --regrade."
        )
    print_plan(config, weights, sets, workdir)
    say_prompt(sets[0].problems[0], actor.template, actor.tokenizer)

    with (
        alone_in(workdir),
        build_checkers(config, (problem for one in sets for problem in one.problems)) as checkers,
    ):
        protocol = protocols.claim(workdir, weights.name, asking, grading, options.regrade)
        unmatched = check_golds(checkers, sets)

        # Act 2, responses: sampled and judged, or judged again.
        if options.regrade:
            responses = regrade(workdir, config, sets, checkers, protocol)
        else:
            responses = answer_all(workdir, config, actor, weights, sets, checkers)

        # Act 3, the report.
        scored = [score(config, one, responses[one.name]) for one in sets if one.name in responses]
        if len(scored) < len(sets):
            say("the evaluation is not finished: the same command without --regrade goes on")
            return []
        write_whole(workdir / "results.json", to_json(scored, protocol, unmatched))
        write_whole(workdir / "results.md", to_markdown(config.name, scored, protocol, unmatched))
        say(f"\n{score_table(scored)}")
        say(f"results        {workdir}/results.md  {workdir}/results.json")
        say(f"responses      {workdir}/generations/")
        compare_graders(workdir, config, responses)
    return scored


def print_plan(config: Config, weights: Weights, sets: Sequence[Asked], workdir: Path) -> None:
    """What is about to be done."""
    settings = config.eval
    ways = ["greedy"] * settings.greedy
    if settings.samples:
        ways.append(f"{settings.samples} samples at temperature {settings.temperature:g}, top-p {settings.top_p:g}")
    say(f"weights        {weights.name}")
    say(f"sets           {', '.join(f'{one.name} ({count_of(one.size, one.whole)})' for one in sets)}")
    say(f"responses      {' and '.join(ways)}, up to {settings.max_response or config.rollout.max_response} tokens")
    say(f"workdir        {workdir}")
    for one in sets:
        if one.unasked:
            limit = config.rollout.max_prompt
            say(f"warning: {one.unasked} prompts of {one.name} exceed {limit} tokens and count as wrong")
        if one.cut:
            say(f"warning: {one.cut} prompts of {one.name} were cut to {config.rollout.max_prompt} tokens")


def check_golds(checkers: Checkers, sets: Sequence[Asked]) -> list[str]:
    """Warns of reference answers that the checker cannot match with themselves; returns the ids of their problems."""
    flaws = checkers.check_golds(problem for one in sets for problem in one.problems)
    if flaws:
        problem, why = next(iter(flaws.items()))
        say(f"warning: {len(flaws)} reference answers cannot be checked, such as that of {problem}: {why}")
    return list(flaws)


def score(config: Config, asked: Asked, rounds: dict[str, Sequence[Answered]]) -> Scored:
    """The figures of one set."""
    return score_set(asked.name, rounds, asked.unasked, asked.whole, partial(graded, config))


def answer_all(
    workdir: Path, config: Config, actor: Actor, weights: Weights, sets: Sequence[Asked], checkers: Checkers
) -> Responses:
    """The responses to all sets; what the workdir lacks is sampled and kept there."""
    rounds = make_rounds(config, actor, max(len(one.problems) for one in sets))
    params, responses = None, {}
    for one in sets:
        began, responses[one.name] = time.perf_counter(), {}
        for way, settings in rounds.items():
            path = generations_path(workdir, one.name, way)
            if params is None and count_done(path) < len(one.problems):
                params = make_decode_params(actor)(weights.load(config, actor))
            with progress(f"{one.name}, {way}", len(one.problems)) as advance:
                responses[one.name][way] = generate_set(
                    path, settings, params, one.problems, checkers, config.seed, advance
                )
        seconds = time.perf_counter() - began
        say(score_line(score(config, one, responses[one.name]), seconds))
    return responses


def generations_path(workdir: Path, name: str, way: str) -> Path:
    """Where the responses to a set are kept."""
    return workdir / "generations" / (f"{name}.jsonl" if way == SAMPLES else f"{name}.{way}.jsonl")


def regrade(workdir: Path, config: Config, sets: Sequence[Asked], checkers: Checkers, protocol: dict) -> Responses:
    """Judges what the workdir holds again, and writes it and regrade.md. Returns the sets that are complete."""
    old = protocols.read_protocol(workdir)
    was = old.get("graded_before", old["grading"])  # of before a regrade that was killed, if one was
    if "graded_before" not in old:
        discard_verdicts(workdir)  # of a regrade that was killed when all was done but this
    ways = [GREEDY] * config.eval.greedy + [SAMPLES] * (config.eval.samples > 0)
    before, after, changes = {}, {}, []
    for one in sets:
        before[one.name] = {way: read_before(generations_path(workdir, one.name, way), one.problems) for way in ways}
        after[one.name] = {way: judge_again(checkers, done) for way, done in before[one.name].items()}
        changes += find_changes(one.name, before[one.name], after[one.name])
    finished = [one for one in sets if all(len(done) == len(one.problems) for done in after[one.name].values())]
    now = partial(score, config)
    then = partial(score, replace(config, code=replace(config.code, grade=was.get("grade", config.code.grade))))
    scored = [[of(one, judged[one.name]) for one in finished] for of, judged in ((then, before), (now, after))]
    write_whole(workdir / "regrade.md", regrade_report(changes, *scored, was, protocol["grading"]))
    if "graded_before" not in old:
        keep_verdicts(workdir)
    # Killed from here on, the verdicts are of two kinds: nothing but another --regrade goes on with them.
    unfinished = {"grading": protocol["grading"] | {"regrade": "not finished"}, "graded_before": was}
    protocols.write_protocol(workdir, protocol | unfinished)
    for name, found in after.items():
        for way, done in found.items():
            rewrite(generations_path(workdir, name, way), done)
    protocols.write_protocol(workdir, protocol)
    discard_verdicts(workdir)
    say(f"{len(changes)} responses are judged differently: {workdir}/regrade.md")
    return {one.name: after[one.name] for one in finished}


def read_before(path: Path, problems: Sequence[Problem]) -> list[Answered]:
    """The responses of a file with the verdicts that they had before a regrade, also one that was killed."""
    kept = path.with_name(path.name + BEFORE)
    path = kept if kept.exists() else path
    return read_generations(path, problems) if path.exists() else []


def keep_verdicts(workdir: Path) -> None:
    """Copies every file of responses."""
    for path in (workdir / "generations").glob("*.jsonl"):
        shutil.copyfile(path, path.with_name(path.name + BEFORE))  # one torn by a kill is copied again


def discard_verdicts(workdir: Path) -> None:
    """Deletes the copies."""
    for path in (workdir / "generations").glob(f"*.jsonl{BEFORE}"):
        path.unlink()


def judge_again(checkers: Checkers, done: Sequence[Answered]) -> list[Answered]:
    """The same responses with today's verdicts."""
    tickets = [[checkers.submit(problem, response.text) for response in responses] for problem, responses in done]
    judged = [judge(checkers, problem, waiting) for (problem, _), waiting in zip(done, tickets, strict=True)]
    return [
        Answered(problem, [
            response._replace(verdict=verdict, vote=vote)
            for response, verdict, vote in zip(responses, verdicts, votes, strict=True)
        ])
        for (problem, responses), (verdicts, votes) in zip(done, judged, strict=True)
    ]  # fmt: skip


def find_changes(
    name: str, before: dict[str, Sequence[Answered]], after: dict[str, Sequence[Answered]]
) -> list[Change]:
    """The responses of one set whose verdict is another than before."""
    pairs = zip(walk({name: before}), walk({name: after}), strict=True)
    return [Change(*was, now[-1].verdict) for was, now in pairs if was[-1].verdict != now[-1].verdict]


def walk(responses: Responses) -> Iterator[tuple]:
    """(set, way, sample, problem, response) of every response."""
    for name, ways in responses.items():
        for way, done in ways.items():
            for problem, judged in done:
                for sample, response in enumerate(judged):
                    yield name, way, sample, problem, response


def compare_graders(workdir: Path, config: Config, responses: Responses) -> None:
    """Writes disagreements.md, if Math-Verify is installed, there is any mathematics, and it was not written before."""
    path = workdir / "disagreements.md"
    rows = [row for row in walk(responses) if row[3].checker == "math"]
    if not rows:
        return
    newest = max(file.stat().st_mtime for file in workdir.glob("generations/*.jsonl"))
    if path.exists() and path.stat().st_mtime > newest:
        say(f"disagreements  {path}")
        return
    if not math_verify.installed():
        say('disagreements  not looked for: pip install "dgpo_jax[peers]" brings Math-Verify, a second grader')
        return
    with math_verify.MathVerifyPool(config.reward.workers) as pool, progress("Math-Verify", len(rows)) as advance:
        tickets = [pool.submit(problem.answer, response.text) for *_, problem, response in rows]
        theirs = []
        for ticket in tickets:
            theirs.append(ticket.result())
            advance(1)
    write_whole(path, make_disagreements(rows, theirs))
    say(f"disagreements  {path}")


def make_disagreements(rows: Sequence[tuple], theirs: Sequence[str]) -> str:
    """The report on the rows of `walk` and what Math-Verify says of each."""
    gave_up = (math_verify.LATE, math_verify.DIED)
    judged = [(row, word) for row, word in zip(rows, theirs, strict=True) if word not in gave_up]
    found = [Disagreement(*row, word) for row, word in judged if differ(row[-1], word)]
    return disagreement_report(found, len(judged), Counter(word for word in theirs if word in gave_up))


def differ(response: Judged, theirs: str) -> bool:
    """Whether one grader says right and the other does not."""
    return response.verdict.correct != (theirs == math_verify.CORRECT)


if __name__ == "__main__":
    run_command("dgpo_jax.evaluate", "Scores a model on benchmarks.", evaluate, Options)
