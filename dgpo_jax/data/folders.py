"""Hugging Face dataset folders: which files of a folder are one split. A clone from the hub, or what `save_to_disk` wrote."""

import json
import re
from pathlib import Path

from dgpo_jax.data.tables import SUFFIXES

# Words of a file's or a folder's name that say its split; the hub goes by the same ones.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")


def find_files(folder, wanted: str = "") -> tuple[str, list[Path]]:
    """The files of one split.

    Args:
        wanted: a split, or CONFIG/SPLIT where the folder holds several configs; '' = train, or the only split.
    Returns:
        (what to call it, such as gsm8k-main-test, its files in order)
    Raises:
        ValueError: no such split, or nothing here says which files are which; with what there is.
    """
    folder = Path(folder)
    config, _, split = wanted.rpartition("/")
    if (folder / "dataset_dict.json").is_file():
        splits = _read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits:
            raise ValueError(f"{folder / 'dataset_dict.json'}: lists no splits; save the data set again.")
        by_split = {str(name): _inside(folder, str(name)) for name in splits} if not config else {}
    elif (folder / "state.json").is_file():
        by_split = {"": folder} if not wanted else {}
    elif configs := _card_configs(folder):
        by_split = _choose_config(folder, configs, config)
    else:
        by_split = _splits_by_name(_inside(folder, config) if config else folder)
    split = _choose_split(folder, by_split, split)
    files = by_split[split]
    name = "-".join(part for part in (folder.resolve().name, config, split) if part)
    return name, files if isinstance(files, list) else _saved_files(files)


def _choose_split(folder, by_split, wanted):
    if wanted in by_split:
        return wanted
    if not wanted and ("train" in by_split or len(by_split) == 1):
        return "train" if "train" in by_split else next(iter(by_split))
    if not by_split:
        raise ValueError(f"{folder}: this was written by save_to_disk, without configs or as one split; leave {wanted!r} out.")
    asked = f"no split {wanted!r}" if wanted else "which split is meant is not said"
    raise ValueError(f"{folder}: {asked}; write {folder}:SPLIT with one of {', '.join(by_split)}.")


def _saved_files(folder):
    """Of one split by `save_to_disk`: state.json lists them."""
    state = _read_object(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):  # written by datasets before 1.7
        raise ValueError(f"{folder}: rows were chosen by an index file, which is not read; save it again after flatten_indices().")
    listed = state.get("_data_files")
    names = [str(entry.get("filename", "")) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names:
        raise ValueError(f"{folder / 'state.json'}: lists no data files; save the data set again.")
    return [_inside(folder, name) for name in names]


def _read_object(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save the data set again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; save the data set again.")
    return value


def _inside(folder, name):
    """A path that a card or a state names, which was written by others and may not lead out of the folder."""
    if not name or "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder}: {name!r} leads out of the folder; fetch the file and name it itself.")
    return folder / name


def _card_configs(folder):
    """The `configs` in the front matter of README.md; empty where there are none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    matter = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not matter:
        return []
    import yaml

    try:
        card_data = yaml.safe_load(matter[1])
    except (yaml.YAMLError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{card}: its front matter is not YAML ({line}); correct it, or name the data file itself.") from None
    configs = card_data.get("configs") if isinstance(card_data, dict) else None
    return [config for config in configs or [] if isinstance(config, dict)] if isinstance(configs, list) else []


def _choose_config(folder, configs, wanted):
    """Split -> files of the config that is wanted; '' = the default, or the only one."""
    names = [str(config.get("config_name", "default")) for config in configs]
    marked = [name for name, config in zip(names, configs, strict=True) if config.get("default") is True or name == "default"]
    name = wanted or (marked or names)[0]
    if name not in names or (not wanted and not marked and len(names) > 1):
        asked = f"no config {wanted!r}" if wanted else "which config is meant is not said"
        raise ValueError(f"{folder}: {asked}; write {folder}:CONFIG/SPLIT with one of {', '.join(names)}.")
    config = configs[names.index(name)]
    base = _inside(folder, str(config["data_dir"])) if config.get("data_dir") else folder
    if not config.get("data_files"):
        return _splits_by_name(base)
    return {split: _matching(base, patterns) for split, patterns in _patterns(config["data_files"]).items()}


def _patterns(data_files):
    """Split -> patterns; a card gives a pattern, a list of them (both are train), or a list of {split, path}."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, path = (entry.get("split", "train"), entry.get("path", "")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return patterns


def _matching(folder, patterns):
    files = []
    for pattern in patterns:
        _inside(folder, pattern)
        try:
            found = sorted(path for path in folder.glob(pattern) if path.is_file())
        except ValueError as error:
            raise ValueError(f"{folder}: {pattern!r}, which README.md names, is no pattern ({error}); name the file itself.") from None
        if not found:
            raise ValueError(f"{folder}: no file is {pattern!r}, which README.md names; fetch it, or name the file you have.")
        files += found
    return list(dict.fromkeys(files))


def _splits_by_name(folder):
    """Split -> files, for a folder whose card does not tell: by words in names, of one format only, Parquet before text."""
    saved = [str(path.parent) for path in sorted(folder.rglob("state.json"))]
    if saved:
        raise ValueError(f"{folder}: it holds several data sets by save_to_disk; name one of {', '.join(saved[:8])}.")
    files = sorted(
        path for path in folder.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_infos.json", "dataset_info.json")
    )  # fmt: skip
    for suffix in (".parquet", ".jsonl", ".json", ".arrow"):
        same = [path for path in files if path.suffix == suffix]
        if same:
            break
    else:
        raise ValueError(f"{folder}: there is no {', '.join(SUFFIXES)} file in it; fetch the data set, or convert it to one of these.")
    by_split: dict[str, list[Path]] = {}
    for path in same:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    unnamed = by_split.pop("", [])
    if by_split:
        return by_split
    if len({SHARD.sub("", path.stem) for path in unnamed}) == 1:
        return {"train": unnamed}  # the hub calls it so too
    names = ", ".join(str(path.relative_to(folder)) for path in unnamed[:8])
    raise ValueError(f"{folder}: nothing says which of its files are which split ({names}); name one of the files itself.")


def _split_of(path):
    """The split that a file's name tells, else its folders', nearest first; '' = none of them."""
    for name in (SHARD.sub("", path.stem), *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return SHARD.sub("", path.stem) if SHARD.search(path.stem) and path.parent.name == "data" else ""
