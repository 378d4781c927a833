"""What a score depends on, written down: whose weights, which problems, which prompt, how sampled, how judged.

`asking` settles which responses are sampled; its hash names the workdir, so that the same command finds them again.
`grading` settles how they are judged; responses outlive it, and `--regrade` judges them anew. `weights` says where
those were found, which does not matter. `sessions` says with what and when it was done: a first entry, and one more
whenever a later session had another device or other versions.

    WORKDIR/protocol.json      {"weights": ..., "asking": ..., "grading": ..., "sessions": [...]}
"""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax

import dgpo_jax
from dgpo_jax.build import Actor, build_params, load
from dgpo_jax.checkpoint import locate, read_params
from dgpo_jax.config import Config, ModelConfig
from dgpo_jax.data.benchmarks import HELD_OUT, NamedSet, parse_sets
from dgpo_jax.data.problems import fingerprint
from dgpo_jax.data.prompts import fit
from dgpo_jax.files import write_whole
from dgpo_jax.manifest import MANIFEST
from dgpo_jax.models import config_from_folder, resolve_folder
from dgpo_jax.models.parameters import abstract_parameters
from dgpo_jax.session import say
from dgpo_jax.types import Problem

PROTOCOL = "protocol.json"
SAMPLE_BYTES = 2**20  # of the start and the end of each weight file, that its fingerprint is made of
# Of model: what the same weights are another function without. The others say how it is computed, and to what rounding.
NOT_ARCHITECTURE = ("path", "initializer_std", "dtype", "remat", "attention", "attention_chunk")
PROMPT = ("tokenizer", "template", "system", "instruction")  # of data: what a model is used to


class Weights(NamedTuple):
    """Where they are; not read yet."""

    name: str  # for people
    checkpoint: Path | None  # folder of one iteration; None = the model's own
    fingerprint: str  # changes with the weights

    def load(self, config: Config, actor: Actor):
        """Params in f32.

        Raises:
            ValueError: they are not those of the model.
        """
        if self.checkpoint is None:
            return build_params(config, actor)
        return read_params(self.checkpoint, abstract_parameters(actor.model.config, actor.mesh))[1]


class Asked(NamedTuple):
    """One set of problems."""

    name: str
    source: str
    problems: Sequence[Problem]  # those that are asked
    unasked: int  # whose prompt is too long under data.too_long=drop: they count as wrong
    fingerprint: str  # of all of them
    whole: int  # problems of the whole set, of which these are the first
    cut: int = 0  # of those asked, without their beginning, under data.too_long=cut

    @property
    def size(self) -> int:
        """Problems of the evaluation, those not asked too."""
        return len(self.problems) + self.unasked


def find_weights(config: Config, actor: Actor, checkpoint: str) -> Weights:
    """Those of a checkpoint, or of model.path, or random ones.

    Args:
        checkpoint: a run's workdir, its checkpoints folder or one iteration of it; "" = none.
    Raises:
        ValueError: there is no sound checkpoint, or it is one of another architecture.
    """
    if checkpoint:
        folder = locate(checkpoint)
        compare_with_run(config, actor, folder)
        content = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()  # it holds a checksum of every file
        return Weights(f"{checkpoint}, {folder.name.replace('_', ' ')}", folder, content[:16])
    if actor.folder:
        files = sorted(Path(actor.folder).glob("*.safetensors"))
        return Weights(config.model.path, None, fingerprint_files(files)[:16])
    sizes = architecture(actor.model.config)
    made_of = json.dumps([config.seed, config.model.initializer_std, sizes], sort_keys=True)
    return Weights(f"random, seed {config.seed}", None, hashlib.sha256(made_of.encode()).hexdigest()[:16])


def architecture(model: ModelConfig) -> dict:
    """The settings that make a function of the weights: sizes, and what no shape of a weight gives away."""
    names = [field.name for field in fields(model) if field.name not in NOT_ARCHITECTURE]
    return {name: getattr(model, name) for name in names}


def compare_with_run(config: Config, actor: Actor, checkpoint: Path) -> None:
    """Holds the settings against those of the run that a checkpoint is of, where its config.json is still there.

    Warns of another prompt or tokenizer.

    Args:
        checkpoint: RUN/checkpoints/iteration_..., or RUN/sft/checkpoints/iteration_...
    Raises:
        ValueError: another architecture, which may fit the weights all the same, as another rope_theta does.
    """
    run = checkpoint.parents[1]
    record = (run.parent if run.name == "sft" else run) / "config.json"
    if not record.exists():
        return
    try:
        of_run = json.loads(record.read_text())
        model, data = of_run["model"], of_run["data"]
        sizes, fix = sizes_of_run(model), "use the settings of the run"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{record} is no config of a run ({type(error).__name__}: {error}); mend it, or move it away."
        ) from None
    _refuse(f"{record} has another model", differences(sizes, architecture(actor.model.config), "model."), fix)
    for name in PROMPT:
        if name in data and data[name] != getattr(config.data, name):
            say(f"warning: the run had data.{name} {data[name]!r}, here it is {getattr(config.data, name)!r}")


def sizes_of_run(model: dict) -> dict:
    """The architecture that a run's config.json tells of: of its model.path if it has one, else of its sizes."""
    if not model["path"]:
        names = architecture(ModelConfig())
        return {name: model[name] for name in names if name in model}  # a setting may be newer than the run
    try:
        return architecture(ModelConfig(**config_from_folder(resolve_folder(model["path"]))))
    except (ValueError, OSError):
        return {}  # the folder is gone, and a run's config.json does not repeat what it said


def fingerprint_files(files: Sequence[Path]) -> str:
    """SHA-256 of names, sizes, and the first and last MiB of each file: to read them whole would take minutes."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def name_sets(config: Config) -> list[NamedSet]:
    """The sets of eval.sets, or data.held_out if there are none.

    Raises:
        ValueError: there is none, or eval.sets cannot be read.
    """
    sets = parse_sets(config.eval.sets) or [NamedSet(HELD_OUT, config.data.held_out)] * bool(config.data.held_out)
    if not sets:
        raise ValueError(
            "eval.sets and data.held_out are empty; name a set to evaluate on, such as --config.eval.sets=math500."
        )
    return sets


def load_sets(config: Config, actor: Actor, sets: Sequence[NamedSet]) -> list[Asked]:
    """Their problems, of each set the first eval.problems.

    Raises:
        ValueError: one cannot be read, or a prompt is too long; it names the set.
    """
    return [_load_set(config, actor, *named) for named in sets]


def _load_set(config: Config, actor: Actor, name: str, source: str) -> Asked:
    try:
        whole = load(config.data, source, config.seed)
        problems = whole[: config.eval.problems or None]
        fitted = fit(problems, actor.tokenizer, actor.template, config.rollout.max_prompt, config.data.too_long)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Asked(name, source, fitted.problems, fitted.dropped, fingerprint(problems)[:16], len(whole), fitted.cut)


def describe_asking(config: Config, actor: Actor, weights: Weights, sets: Sequence[Asked]) -> dict:
    """All that settles which responses are sampled."""
    data, rollout, settings = config.data, config.rollout, config.eval
    return {
        "weights": weights.fingerprint,
        "model": architecture(actor.model.config),
        "dtype": str(actor.model.compute_dtype),
        "tokenizer": data.tokenizer or "the model's own",
        "template": data.template,
        "system": data.system,
        "instruction": data.instruction,
        "example_prompt": actor.template.render(sets[0].problems[0].problem, actor.tokenizer),
        "max_prompt": rollout.max_prompt,
        "max_response": settings.max_response or rollout.max_response,
        "greedy": settings.greedy,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": rollout.top_k,
        "seed": config.seed,
        "sets": {
            one.name: {
                "source": one.source,
                "problems": one.size,
                "of": one.whole,
                "too_long": one.unasked,
                "fingerprint": one.fingerprint,
            }
            | ({"cut": one.cut} if one.cut else {})
            for one in sets
        },
    }


def describe_grading(config: Config, sets: Sequence[Asked]) -> dict:
    """All that settles how responses are judged."""
    reward, code = config.reward, config.code
    kinds = {problem.checker for one in sets for problem in one.problems}
    grading = {"grader": grader_version(), "extract": reward.extract}
    if kinds - {"code"}:
        grading |= {"deadline_s": reward.deadline_s, "memory_mb": reward.memory_mb}
    if kinds - {"math"}:
        grading |= {"grade": code.grade}
    if "code" in kinds:
        grading |= {
            "sandbox": code.sandbox,
            "test_s": code.test_s,
            "wall_s": code.wall_s,
            "code_memory_mb": code.memory_mb,
            "max_tests": code.max_tests,
        }
    return grading


def grader_version() -> str:
    """Such as 0.1.0+ab12cd34: of the package, and a hash of the source of everything that judges."""
    folder = Path(dgpo_jax.__file__).parent / "rewards"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return f"{package_version()}+{digest.hexdigest()[:8]}"


def package_version() -> str:
    """Of dgpo_jax, also where it runs from its repository and was never installed."""
    try:
        return version("dgpo_jax")
    except PackageNotFoundError:
        project = Path(dgpo_jax.__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"] if project.exists() else "unknown"


def describe_session() -> dict:
    """With what, and when."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "dgpo_jax": package_version(),
        "jax": jax.__version__,
        "sympy": version("sympy"),  # it decides what is equal
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }


def default_workdir(config: Config, asking: dict) -> Path:
    """evals/NAME-HASH: the same protocol finds its responses again, however they are judged."""
    text = json.dumps(asking, sort_keys=True)
    return Path("evals") / f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def claim(
    workdir: Path, weights: str, asking: dict, grading: dict, regrade: bool = False,
    way_on: str = "add --regrade to judge them again, or use another --workdir",
) -> dict:  # fmt: skip
    """Writes protocol.json, or sees to it that the one that is there is the same; returns the protocol.

    Args:
        way_on: what can be done about responses that were judged otherwise.
    Raises:
        ValueError: the workdir holds responses by another protocol (saying what differs), or judged otherwise, and
            `regrade` does not ask for that to change.
    """
    path, sessions = workdir / PROTOCOL, []
    if path.exists():
        before = read_protocol(workdir)
        fix = "use another --workdir, or that protocol"
        _refuse(f"{workdir} holds responses by another protocol", differences(before["asking"], asking), fix)
        if not regrade:
            found = differences(before["grading"], grading)
            _refuse(f"{workdir} holds responses that were judged otherwise", found, way_on)
        sessions = before["sessions"]
    now = describe_session()
    if not sessions or {**sessions[-1], "date": ""} != {**now, "date": ""}:
        sessions = [*sessions, now]
    protocol = {"weights": weights, "asking": asking, "grading": grading, "sessions": sessions}
    if not regrade:  # else it is written when the last response has been judged again
        write_protocol(workdir, protocol)
    return protocol


def read_protocol(workdir: Path) -> dict:
    """What the workdir holds responses by.

    Raises:
        ValueError: the file is damaged.
    """
    path = workdir / PROTOCOL
    try:
        protocol = json.loads(path.read_text())
        for name in ("asking", "grading"):
            _require_object(name, protocol[name])
        if "graded_before" in protocol:
            _require_object("graded_before", protocol["graded_before"])
        if not isinstance(protocol["sessions"], list):
            raise TypeError(f"sessions is {repr(protocol['sessions'])[:60]}, but it is a list")
        for number, session in enumerate(protocol["sessions"]):
            _require_object(f"sessions[{number}]", session)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); put back a copy of it, or use another --workdir:"
            " nothing else says what the responses there belong to."
        ) from None
    return protocol


def _require_object(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {repr(value)[:60]}, but it is an object")


def write_protocol(workdir: Path, protocol: dict) -> None:
    """Whole or not at all."""
    write_whole(workdir / PROTOCOL, json.dumps(protocol, indent=2) + "\n")


def differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """What two protocols say differently, a line for each."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name), after.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append(f"{prefix}{name} was {was!r} and is {now!r}")
    return found


def _refuse(what: str, found: list[str], fix: str) -> None:
    if found:
        raise ValueError(f"{what}: {'; '.join(found)}; {fix}.")
