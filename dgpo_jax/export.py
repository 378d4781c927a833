"""A checkpoint as a Hugging Face folder, which transformers and this project load.

    python -m dgpo_jax.export --workdir=runs/smollm2-0123abcd --output=exported --dtype=bfloat16

Read `export` from top to bottom; docs/export.md says what is in the folder. One parameter at a time is in memory, no
accelerator is started, and torch is not needed.

Which weights (--checkpoint):
    ''                    the newest sound checkpoint of the run, else of its warm start
    best                  the one with the best evaluation
    iteration_000120      this one
    sft                   the newest sound one of the warm start; sft/iteration_000060 names one of these

The folder appears whole or not at all: it is written as OUTPUT.partial and then renamed.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dgpo_jax.checkpoint.arrays import require_same_arrays
from dgpo_jax.checkpoint.folders import (
    ARRAYS,
    entries,
    find_sound,
    flaw_of,
    list_flaws,
    locate,
    read_details,
    read_score,
)
from dgpo_jax.config import DataConfig, ModelConfig, RolloutConfig, UpdateConfig
from dgpo_jax.data.tokenizers import Tokenizer, load_tokenizer
from dgpo_jax.models import config_from_folder, resolve_folder
from dgpo_jax.models.hf_config import read_object
from dgpo_jax.models.hf_export import (
    hugging_face_config,
    refuse_existing,
    weight_bytes,
    write_json,
    write_weights,
    written_whole,
)
from dgpo_jax.models.parameters import parameter_count, table
from dgpo_jax.rules import require, require_in_32_bits
from dgpo_jax.session import in_words, say
from dgpo_jax.workdir import read_record

# What a tokenizer may consist of in a Hugging Face folder.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROBE = "Tom's 1234 apples:\n\n  x=\\boxed{-5.0} naïve e\u0301 日本 😀"  # on what tokenizers differ: spaces, digits, signs, accents
SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Options:
    """Flags of the command."""

    workdir: str  # of the run
    output: str  # folder to write; must not exist, or be empty
    checkpoint: str = ""  # best, sft, iteration_000120 or sft/iteration_000060; '' = the newest
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in the files; float32 = as they were trained, to the bit
    shard_gb: float = 4.0  # largest file of weights, in 1e9 bytes
    source: str = ""  # the folder the run started from, if it is no longer where model.path says

    def __post_init__(self):
        require(0 < self.shard_gb < 1e6, "shard-gb", self.shard_gb, "it is a size in 1e9 bytes", "give a number such as 4.0")


class Run(NamedTuple):
    """What a run's config.json says that an export needs."""

    model: ModelConfig
    folder: Path | None  # that it started from; None = random weights
    tokenizer: str  # name, as load_tokenizer takes it
    sampling: dict  # SAMPLING, of training
    longest: int  # tokens of a training row


def export(options: Options) -> Path:
    """Writes the folder, and says how to load it.

    Returns:
        Its path.
    Raises:
        ValueError: workdir, checkpoint, output or disk do not allow it.
    """
    # Act 1, what there is: whatever can be refused is refused before a weight is read.
    output, workdir = Path(options.output).absolute(), Path(options.workdir)
    refuse_existing(output)
    run = read_run(workdir, options.source)
    checkpoint = find_checkpoint(workdir, options.checkpoint)
    what = check_arrays(checkpoint, run.model)
    tokenizer = load_tokenizer(run.tokenizer)
    settings = make_config(run, tokenizer, options.dtype)
    generation = make_generation_config(run, tokenizer)
    say(f"weights        {checkpoint}")
    say(f"model          {settings['architectures'][0]}, {parameter_count(run.model):,} parameters, {options.dtype}")

    # Act 2, the folder.
    size = weight_bytes(run.model, options.dtype)
    with written_whole(output, size) as partial:
        write_json(partial / "config.json", settings)
        write_tokenizer(tokenizer, partial)
        write_json(partial / "generation_config.json", generation)
        with reading(checkpoint) as read:
            files = write_weights(partial, run.model, read, options.dtype, int(options.shard_gb * 1e9))
        others = sorted(path.name for path in partial.iterdir() if path not in files and path.name != "lock")

    # Act 3, what came out.
    of = "the warm start" if checkpoint.parents[1].name == "sft" else "the run"
    more = f" and {len(files) - 1} more" if files[1:] else ""
    say(f"wrote          {output}: {what} of {of}")
    say(f"               {files[0].name}{more}, {size / 1e6:,.2f} MB; {', '.join(others)}\n")
    say("from transformers import AutoModelForCausalLM, AutoTokenizer")
    say(f"model, tokenizer = AutoModelForCausalLM.from_pretrained({str(output)!r}), AutoTokenizer.from_pretrained({str(output)!r})")
    return output


def read_run(workdir: Path, source: str) -> Run:
    """What config.json in the workdir says, and the folder that the run started from.

    Raises:
        ValueError: no such workdir or folder, or no config of a run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        fix = "; for a warm start give the run's workdir and --checkpoint=sft" if workdir.name == "sft" else ""
        raise ValueError(f"--workdir {workdir}: there is no config.json; give the folder of a run{fix}.")
    settings = read_record(path)
    try:
        model = ModelConfig(**settings["model"])
        named = DataConfig(tokenizer=settings["data"]["tokenizer"]).tokenizer
        rollout = RolloutConfig(**{name: settings["rollout"][name] for name in SAMPLING})
        update = UpdateConfig(tokens_per_row=settings["update"]["tokens_per_row"])
        for group, section in {"model": model, "rollout": rollout, "update": update}.items():
            for name, value in vars(section).items():
                require_in_32_bits(f"{group}.{name}", value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no config of a run of this version ({type(error).__name__}: {error}); mend it, or give another --workdir."
        ) from None
    folder = None
    if source and not model.path:
        raise ValueError(f"--source is {source!r}, but the run of {workdir} started from random weights; leave it out.")
    if model.path:
        folder = find_source(source or model.path)
        model = replace(model, **config_from_folder(folder))
    if not named and folder is None:
        raise ValueError(f"{path}: data.tokenizer and model.path are both empty; name the run's tokenizer there.")
    return Run(model, folder, named or str(folder), {name: getattr(rollout, name) for name in SAMPLING}, update.tokens_per_row)


def find_source(path: str) -> Path:
    """The folder that a run started from; ValueError if it is not to be had."""
    try:
        return resolve_folder(path)
    except ValueError as error:
        raise ValueError(f"{error} The folder that the run started from can be named with --source.") from None


def find_checkpoint(workdir: Path, wanted: str) -> Path:
    """The folder of the checkpoint that --checkpoint asks for. Says of newer ones why they are not used.

    Raises:
        ValueError: it is not there, or not sound.
    """
    own, warm_start = workdir / "checkpoints", workdir / "sft" / "checkpoints"
    if wanted == "best":
        return find_best(own)
    if wanted in ("", "sft"):
        found = (newest_in(own) if not wanted else None) or newest_in(warm_start)
        if found is None:
            of = " of its warm start" if wanted else ""
            raise ValueError(f"--workdir {workdir}: there is no finished checkpoint{of}; let the run get to its first save.")
        return found
    there = {entry.path.name: entry.path for entry in entries(own)}
    there |= {f"sft/{entry.path.name}": entry.path for entry in entries(warm_start)}
    if wanted not in there:
        fix = f"give one of {', '.join([*there, 'best'])}" if there else "it has none, so let it get to its first save"
        raise ValueError(f"--checkpoint is {wanted!r}, but the run in {workdir} has none of that name; {fix}.")
    return locate(there[wanted])


def newest_in(folder: Path) -> Path | None:
    """The newest sound checkpoint; None if none was finished."""
    found, unsound = find_sound(folder)
    if unsound:
        say(f"warning: not used: {list_flaws(unsound)}")
    return found.path.absolute() if found else None


def find_best(folder: Path) -> Path:
    """The sound checkpoint with the best score; of equal ones the newest.

    Raises:
        ValueError: none has a score.
    """
    scored = [(score, entry.path) for entry in entries(folder) if (score := read_score(entry.path)) is not None]
    for score, path in sorted(scored, key=lambda pair: pair[0], reverse=True):  # equal ones keep their order
        flaw = flaw_of(path)
        if flaw is None:
            say(f"best           {path.name}, {score:g}")
            return path.absolute()
        say(f"warning: not used: {path.name} ({flaw})")
    raise ValueError(
        f"--checkpoint is 'best', but no sound checkpoint in {folder} has a score; a run that evaluates gives them one."
        " Name one, such as iteration_000120, or leave it out for the newest."
    )


def check_arrays(checkpoint: Path, model: ModelConfig) -> str:
    """What a checkpoint is of, such as "iteration 12"; its weights are those of the model in name, shape and dtype.

    Raises:
        ValueError: they are not.
    """
    details = read_details(checkpoint)
    saved = {name: what for name, what in details["arrays"].items() if name.startswith("params/")}
    target = {f"params/{name}": jax.ShapeDtypeStruct(row.shape, np.float32) for name, row in table(model).items()}
    require_same_arrays(checkpoint, saved, target)
    amid = details["extra"].get("collected") is not None  # the run was stopped there
    return f"iteration {details['iteration']}, amid its updates," if amid else f"iteration {details['iteration']}"


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[Callable[[str], np.ndarray]]:
    """A function that reads one parameter of a checkpoint, f32, to the host's memory, from however many devices it was saved."""
    with ocp.PyTreeCheckpointer() as checkpointer:

        def read(name: str) -> np.ndarray:
            key = f"params/{name}"
            settings = ocp.args.PyTreeRestore(
                item={key: 0}, restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
            )
            try:
                return checkpointer.restore(checkpoint / ARRAYS, args=settings)[key]
            except (OSError, ValueError, KeyError) as error:  # it was sound a moment ago
                why = (str(error).splitlines() or ["?"])[0][:200]
                raise ValueError(
                    f"{checkpoint}: {key} cannot be read any more ({why}); a run that goes on deletes old checkpoints: export again."
                ) from None

        yield read


def make_config(run: Run, tokenizer: Tokenizer, dtype: str) -> dict:
    """config.json: that of the folder the run started from, with the new dtype; else made from the run's sizes."""
    if run.folder is None:
        ids = special_ids(tokenizer) | {"eos_token_id": tokenizer.stop_ids[0]}
        return hugging_face_config(run.model, dtype, run.longest) | ids
    settings = read_object(run.folder / "config.json")
    settings.pop("torch_dtype", None)  # the older name of dtype, which would contradict it
    return settings | {"dtype": dtype}


def make_generation_config(run: Run, tokenizer: Tokenizer) -> dict:
    """generation_config.json: that of the folder the run started from, else how the run sampled; it stops where the run did."""
    path = run.folder / "generation_config.json" if run.folder else None
    settings = read_object(path) if path and path.is_file() else {"do_sample": True} | run.sampling
    stops = list(tokenizer.stop_ids)
    return special_ids(tokenizer) | settings | {"eos_token_id": stops if stops[1:] else stops[0]}


def special_ids(tokenizer: Tokenizer) -> dict:
    """pad_token_id, and bos_token_id if there is one."""
    bos = tokenizer.inner.bos_token_id
    return {"pad_token_id": tokenizer.pad_id} | ({} if bos is None else {"bos_token_id": bos})


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files of the tokenizer, chat template included: copied, or written if they are in no folder here.

    For a model_type qwen2 transformers 5 builds Qwen2's own tokenizer from the vocabulary alone, whatever tokenizer.json
    says and tokenizer_class names; an auto_map that names nothing has it believe these.
    """
    if os.path.isdir(tokenizer.name):
        for name in TOKENIZER_FILES:
            if (Path(tokenizer.name) / name).is_file():
                shutil.copyfile(Path(tokenizer.name) / name, folder / name)
    else:
        tokenizer.save(folder)
    if reads_alike(tokenizer, folder):
        return
    path = folder / "tokenizer_config.json"
    write_json(path, read_object(path) | {"auto_map": {"AutoTokenizer": [None, None]}})
    if not reads_alike(tokenizer, folder):
        say(f"warning: AutoTokenizer of this transformers reads other ids than {tokenizer.name} gives; use PreTrainedTokenizerFast")


def reads_alike(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the tokenizer in the folder, which has its config.json already, gives the same ids."""
    text = PROBE + "a".join(tokenizer.inner.all_special_tokens)
    return load_tokenizer(str(folder)).encode(text) == tokenizer.encode(text)


def main(arguments: list[str] | None = None) -> None:
    """The command line; faults end it with one line and no traceback."""
    import tyro  # here, so that the tests that need no command line start faster

    options = tyro.cli(Options, args=arguments, prog="python -m dgpo_jax.export", description=__doc__.splitlines()[0])
    jax.config.update("jax_platforms", "cpu")  # Orbax starts JAX's backend, which would take an accelerator from a run
    try:
        export(options)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("DGPO_JAX_TRACEBACK"):
            raise
        print(f"error: {in_words(error, another='another --output')}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
