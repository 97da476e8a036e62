"""Chooses the files of a split in a folder or a Hub dataset: by its README, else by file names. Pure except for `read`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from launcher.data.sources.files import COMPRESSED, KINDS, detect_kind
from launcher.data.sources.row_values import refuse

# The split of held-out documents, if none is set.
HELD_OUT = "validation or test"
README = "README.md"
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
# Unsupported compression and archives.
_UNSUPPORTED = (".xz", ".lzma", ".bz2", ".lz4", ".br", ".snappy", ".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tar.zst", ".tgz")
# The lines of a README between a first line `---` and the next `---`.
_FRONT_MATTER = re.compile(r"---[ \t\r]*\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
# Files that accompany data in such folders.
_NOT_DATA = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|(readme|license|notice|requirements)\b.*", re.IGNORECASE)


def choose_files(
    names: Sequence[str], read: Callable[[str], bytes], subset: str | None, split: str | None, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the data files of the subset and split, and the other files that could be data, sorted.

    `names` are paths with slashes, relative to the folder. The default split is train, or the only split; if no name shows a
    split, all files are the data.

    Raises:
        DataError: if the subset or split does not exist, with those that do.
    """
    configs = _configs(read(README), where) if README in names else []
    if configs:
        by_split = _by_readme(_subset(configs, subset, where), names, where)
    elif subset is not None:
        refuse(f"there is no subset {subset}: the dataset has only one", where, "remove the source's subset")
    else:
        by_split = _by_names(_data_files(names, where))
    chosen = by_split[_select_split(by_split, split, where)]
    return tuple(chosen), tuple(sorted(set(filter(_may_be_data, names)).difference(chosen)))


def _select_split(by_split: dict[str, list[str]], split: str | None, where: str) -> str:
    if by_split.keys() == {""}:
        if split not in (None, HELD_OUT):
            remedy = "remove the source's split, or name the files themselves in its path"
            refuse(f"no file belongs to the split {split}: the file names show no splits", where, remedy)
        return ""
    if "" in by_split:
        names = {key: ", ".join(files[:3]) for key, files in by_split.items() if key}
        message = f"{', '.join(by_split[''][:3])} belongs to no split, but other files do ({'; '.join(names.values())})"
        refuse(message, where, "name the files in the source's path with a pattern, such as DIR/train*.jsonl")
    candidates = split.split(" or ") if split is not None else ["train"] if len(by_split) > 1 else list(by_split)
    for name in candidates:
        if name in by_split:
            return name
    message = f"there is no split {' or '.join(candidates)} (there are: {', '.join(by_split)})"
    refuse(message, where, "set the source's split (for held-out documents data.eval_split) to one of them")


def _may_be_data(name: str) -> bool:
    """Return False for hidden files, and for those that accompany data."""
    path = PurePosixPath(name)
    return not any(part.startswith((".", "_")) for part in path.parts) and _NOT_DATA.fullmatch(path.name) is None


def _data_files(names: Sequence[str], where: str) -> list[str]:
    candidates = sorted(filter(_may_be_data, names))
    if unsupported := [name for name in candidates if name.lower().endswith(_UNSUPPORTED)]:
        more = f" and {len(unsupported) - 3} more" if len(unsupported) > 3 else ""
        message = f"the folder holds archives or files in an unsupported compression: {', '.join(unsupported[:3])}{more}"
        remedy = f"unpack them (or compress with {' or '.join(COMPRESSED)}), or name the files to read in the source's path"
        refuse(message, where, remedy)
    data = [name for name in candidates if detect_kind(name)]
    # Text files next to tables or JSON are notes.
    data = [n for n in data if detect_kind(n) != "txt"] or data
    if not data:
        endings = sorted({PurePosixPath(name).suffix for name in names} - {""})
        code = " Code that builds a dataset is never run." if ".py" in endings else ""
        remedy = f"data files end in {', '.join(KINDS)}, with {' or '.join(COMPRESSED)} after it if they are compressed.{code}"
        refuse(f"the folder holds no data file (extensions: {', '.join(endings) or 'none'})", where, remedy)
    return data


def _by_names(data: Sequence[str]) -> dict[str, list[str]]:
    """Return the files by split; files whose names show no split are under ""."""
    by_split: dict[str, list[str]] = {}
    for name in data:
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_OF_WORD]
        # The last word wins, because it is in the file's own name, not in a folder's.
        by_split.setdefault(_SPLIT_OF_WORD[words[-1]] if words else "", []).append(name)
    return by_split


def _configs(readme: bytes, where: str) -> list[dict[str, Any]]:
    """Return the `configs` of a dataset's README."""
    import yaml

    front_matter = _FRONT_MATTER.match(readme.decode(errors="replace"))
    if front_matter is None:
        return []
    try:
        head = yaml.safe_load(front_matter[1])
    except yaml.YAMLError as error:
        refuse(f"the head of {README} is not YAML: {str(error).splitlines()[0]}", where, "name the files in the source's path")
    configs = head.get("configs") if isinstance(head, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _subset(configs: Sequence[dict[str, Any]], subset: str | None, where: str) -> dict[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    if subset is not None and subset not in names:
        refuse(f"there is no subset {subset} (there are: {', '.join(names)})", where, "set the source's subset to one of them")
    for name, config in zip(names, configs, strict=True):
        if name == subset or (subset is None and (len(configs) == 1 or name == "default" or config.get("default") is True)):
            return config
    refuse(f"the dataset has several subsets: {', '.join(names)}", where, "set the source's subset to one of them")


def _by_readme(config: dict[str, Any], names: Sequence[str], where: str) -> dict[str, list[str]]:
    from fsspec.utils import glob_translate

    folder = str(config.get("data_dir", "")).strip("/")
    inside = [name for name in names if not folder or name.startswith(f"{folder}/")]
    entries = config.get("data_files")
    if entries is None:
        return _by_names(_data_files(inside, where))
    entries = entries if isinstance(entries, list) else [entries]
    by_pattern: list[tuple[str, str]] = []
    for entry in entries:
        split, patterns = (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        by_pattern += [(split, str(pattern)) for pattern in (patterns if isinstance(patterns, list) else [patterns])]
    prefix = f"{folder}/" if folder else ""
    relative = [name.removeprefix(prefix) for name in inside]
    by_split: dict[str, list[str]] = {}
    for split, pattern in by_pattern:
        matches = re.compile(glob_translate(pattern.removeprefix("./"))).match
        matched = [prefix + name for name in relative if matches(name)]
        if not matched:
            remedy = "correct the pattern, or name the files in the source's path"
            refuse(f"no file matches the pattern {pattern} of {README}", where, remedy)
        by_split.setdefault(split, []).extend(_data_files(matched, where))
    return {split: sorted(set(files)) for split, files in by_split.items()}
