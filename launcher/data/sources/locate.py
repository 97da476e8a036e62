"""Locates the files of a source: local files, folders and patterns, Hub datasets, fsspec addresses, which are downloaded once."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from launcher.config.sections.data import RowSource
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.data.cache_dir import convert_os_errors, fetch_dataset_file, mark_used, print_once, source_folder
from launcher.data.sources.builtin import BUILTINS
from launcher.data.sources.documents import refuse
from launcher.data.sources.files import COMPRESSED, KINDS, DataFile, compute_digest, detect_kind
from launcher.errors import DataError, Problem
from launcher.hardware import is_full
from launcher.runs import atomic_files
from launcher.runs.locks import wait_and_hold
from launcher.security.connections import access_remedy, require_known_hosts
from launcher.security.redaction import redacted_command_line

_COMMIT_DIGITS = 40
_HUB_TIMEOUT_S = 20.0
# Too many requests, and server errors.
_TEMPORARY = (429, *range(500, 600))
# File metadata that changes with the content, by its names in various storages.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id", "sha", "CRC"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modificationTime", "updated", "created"),
)

# The split of held-out documents, if none is set.
HELD_OUT = "validation or test"
README = "README.md"
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Unsupported compression and archives.
_UNSUPPORTED = (".xz", ".lzma", ".bz2", ".lz4", ".br", ".snappy", ".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tar.zst", ".tgz")
# The lines of a README between a first line `---` and the next `---`.
_FRONT_MATTER = re.compile(r"---[ \t\r]*\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
# Files that accompany data in such folders.
_NOT_DATA = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|(readme|license|notice|requirements)\b.*", re.IGNORECASE)


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source: those that are read, and those of its folder that are left out; `commit` is that of a Hub dataset.

    `digest` returns a text that changes with the bytes of the files, not with the path of local ones. Both functions raise
    DataError.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]
    commit: str | None
    digest: Callable[[], str]
    fetch: Callable[[], tuple[DataFile, ...]]


def is_url(path: str) -> bool:
    """Return True for an address with a protocol, such as s3://."""
    return "://" in path


def is_hub(path: str) -> bool:
    """Return True for owner/name, unless it is a local file or folder, or has the name of a data file."""
    return HUB_ID_PATTERN.fullmatch(path) is not None and detect_kind(path) is None and not Path(path).exists()


def has_splits(path: str) -> bool:
    """Return True for a folder, a Hub dataset or an address; files named by a path or a pattern have no splits."""
    return is_url(path) or is_hub(path) or Path(path).expanduser().is_dir()


def find_files(source: RowSource) -> SourceFiles:
    """Find the files of the source, none for a data set of the launcher; lists remote ones. Raises DataError."""
    if source.path in BUILTINS:
        return SourceFiles((), (), None, BUILTINS[source.path].digest, lambda: ())
    if is_url(source.path):
        return _find_at_address(source)
    return _find_on_hub(source) if is_hub(source.path) else _find_local(source)


def find_local_problem(key: str, source: RowSource) -> Problem | None:
    """Check a local path on disk and return its problem; `key` is its setting."""
    value, path = source.path, Path(source.path).expanduser()
    remedy = f"set {key} to a data file, a folder, a pattern, a Hub dataset (owner/name) or an address (s3://...)"
    if glob.has_magic(value) and not path.exists():
        if not _match_pattern(value):
            return Problem("no file matches the pattern", key, value, f"{remedy}; relative paths start at {Path.cwd()}")
    elif not path.is_file() and not path.is_dir():
        return Problem("there is no such data file or folder", key, value, f"{remedy}; relative paths start at {Path.cwd()}")
    if not path.is_dir() and (source.split, source.subset, source.revision) != (None, None, None):
        return Problem("split, subset and revision do not apply to a path that names files", key, value, "remove them")
    try:
        files = _find_local(source).fetch()
    except DataError as error:
        (problem,) = error.problems
        return Problem(problem.message, key, value, problem.remedy)
    empty = [file.name for file in files if file.path.stat().st_size == 0]
    which = "" if empty == [value] else f": {', '.join(empty[:3])}"
    return Problem(f"the data file is empty{which}", key, value, "add rows to it, or remove it") if empty else None


def _find_local(source: RowSource) -> SourceFiles:
    path = Path(source.path).expanduser()
    files: tuple[DataFile, ...] = (DataFile(path, source.path),)
    left_out: tuple[str, ...] = ()
    if path.is_dir():
        chosen, left_out = _choose_files(
            _list_names(path), lambda name: (path / name).read_bytes(), source.subset, source.split, source.path
        )
        files = tuple(DataFile(path / name, f"{source.path.rstrip('/')}/{name}") for name in chosen)
    elif glob.has_magic(source.path) and not path.exists():
        files = tuple(DataFile(Path(name), name) for name in _match_pattern(source.path))
    return SourceFiles(
        tuple(file.name for file in files),
        left_out,
        None,
        lambda: ", ".join(f"{detect_kind(file.name)} {compute_digest(file)}" for file in files),
        lambda: files,
    )


def _list_names(folder: Path) -> list[str]:
    """Return the files below `folder`, following links; a folder that several links lead to is listed once."""
    names, seen = [], set()

    def refuse_folder(error: OSError) -> NoReturn:
        message = f"the folder {error.filename} cannot be read: {error.strerror}"
        refuse(message, str(error.filename), "check its permissions and the disk")

    for parent, folders, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        # Folders themselves come before links to them.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files if Path(parent, name).is_file()]
    return sorted(names)


def _match_pattern(pattern: str) -> list[str]:
    return sorted(filter(os.path.isfile, glob.iglob(os.path.expanduser(pattern), recursive=True)))


# Splits


def _choose_files(
    names: Sequence[str], read: Callable[[str], bytes], subset: str | None, split: str | None, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the data files of the subset and split, and the other files that could be data, sorted.

    The README of the folder or Hub dataset `where` decides, else the names of the files. `names` are paths with slashes,
    relative to the folder. The default split is train, or the only split; if no name shows a split, all files are the data.
    Raises DataError if the subset or split does not exist, with those that do.
    """
    by_split = _group_by_readme(read(README), subset, names, where) if README in names else None
    if by_split is None:
        if subset is not None:
            refuse(f"there is no subset {subset}: the dataset has only one", where, "remove the source's subset")
        by_split = _group_by_name(_list_data_files(names, where))
    if by_split.keys() == {""}:
        if split not in (None, HELD_OUT):
            remedy = "remove the source's split, or name the files themselves in its path"
            refuse(f"no file belongs to the split {split}: the file names show no splits", where, remedy)
        candidates = [""]
    elif "" in by_split:
        others = "; ".join(", ".join(files[:3]) for key, files in by_split.items() if key)
        message = f"{', '.join(by_split[''][:3])} belongs to no split, but other files do ({others})"
        refuse(message, where, "name the files in the source's path with a pattern, such as DIR/train*.jsonl")
    else:
        candidates = split.split(" or ") if split is not None else ["train"] if len(by_split) > 1 else list(by_split)
    chosen = next((by_split[name] for name in candidates if name in by_split), None)
    if chosen is None:
        message = f"there is no split {' or '.join(candidates)} (there are: {', '.join(by_split)})"
        refuse(message, where, "set the source's split (for held-out documents data.eval_split) to one of them")
    return tuple(chosen), tuple(sorted(set(filter(_may_be_data, names)).difference(chosen)))


def _may_be_data(name: str) -> bool:
    """Return False for hidden files, and for those that accompany data."""
    path = PurePosixPath(name)
    return not any(part.startswith((".", "_")) for part in path.parts) and _NOT_DATA.fullmatch(path.name) is None


def _list_data_files(names: Sequence[str], where: str) -> list[str]:
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


def _group_by_name(data: Sequence[str]) -> dict[str, list[str]]:
    """Return the files by split; files whose names show no split are under ""."""
    by_split: dict[str, list[str]] = {}
    for name in data:
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_OF_WORD]
        # The last word wins, because it is in the file's own name, not in a folder's.
        by_split.setdefault(_SPLIT_OF_WORD[words[-1]] if words else "", []).append(name)
    return by_split


def _group_by_readme(readme: bytes, subset: str | None, names: Sequence[str], where: str) -> dict[str, list[str]] | None:
    """Return the files of a subset by split, as the `configs` of the dataset's README describe them; None without any."""
    import yaml
    from fsspec.utils import glob_translate

    front_matter = _FRONT_MATTER.match(readme.decode(errors="replace"))
    try:
        head = yaml.safe_load(front_matter[1]) if front_matter is not None else None
    except yaml.YAMLError as error:
        refuse(f"the head of {README} is not YAML: {str(error).splitlines()[0]}", where, "name the files in the source's path")
    configs = head.get("configs") if isinstance(head, dict) else None
    configs = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    if not configs:
        return None
    subsets = [str(config.get("config_name", "default")) for config in configs]
    if subset is not None and subset not in subsets:
        refuse(f"there is no subset {subset} (there are: {', '.join(subsets)})", where, "set the source's subset to one of them")
    for name, config in zip(subsets, configs, strict=True):
        if name == subset or (subset is None and (len(configs) == 1 or name == "default" or config.get("default") is True)):
            break
    else:
        refuse(f"the dataset has several subsets: {', '.join(subsets)}", where, "set the source's subset to one of them")
    folder = str(config.get("data_dir", "")).strip("/")
    inside = [name for name in names if not folder or name.startswith(f"{folder}/")]
    entries = config.get("data_files")
    if entries is None:
        return _group_by_name(_list_data_files(inside, where))
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
        by_split.setdefault(split, []).extend(_list_data_files(matched, where))
    return {split: sorted(set(files)) for split, files in by_split.items()}


# Hub datasets


def _find_on_hub(source: RowSource) -> SourceFiles:
    """Find the files of the source's subset and split at a commit of a Hub dataset.

    The Hub is queried unless the revision is a commit with a stored listing, which also counts if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    record = source_folder("hub", source.path, source.revision, source.subset, source.split) / "listing.json"
    stored = json.loads(record.read_bytes()) if record.is_file() else None
    if stored is None or len(source.revision or "") != _COMMIT_DIGITS:
        try:
            info = HfApi().dataset_info(source.path, revision=source.revision, timeout=_HUB_TIMEOUT_S)
            names = [sibling.rfilename for sibling in info.siblings or ()]

            def read(name: str) -> bytes:
                return fetch_dataset_file(source.path, name, str(info.sha)).read_bytes()

            chosen, others = _choose_files(names, read, source.subset, source.split, source.path)
        except DataError:
            raise
        except Exception as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
            # The error's name tells a missing dataset, whose status is 401 or 404, from a missing revision and a gated dataset.
            reason = f"the hub answered with {status}" if status else "the hub cannot be reached"
            reason += f" ({type(error).__name__})"
            if stored is None or (status and status not in _TEMPORARY):
                raise _make_unreachable(source, reason) from error
            print_once(f"{reason}; {source.path} is read at the last known commit {stored['commit']}")
        else:
            stored = {"commit": str(info.sha), "files": chosen, "left_out": others}
            with convert_os_errors(record.parent):
                record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_files.write_json(record, stored)
    commit, files, left_out = stored["commit"], tuple(stored["files"]), tuple(stored["left_out"])

    def fetch(name: str) -> DataFile:
        try:
            return DataFile(fetch_dataset_file(source.path, name, commit), f"{source.path}/{name}")
        except DataError:
            raise
        except Exception as error:
            why = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise _make_unreachable(source, f"{name} cannot be fetched: {type(error).__name__}{why}") from error

    return SourceFiles(
        files, left_out, commit, lambda: f"{source.path}@{commit}: {', '.join(files)}", lambda: tuple(map(fetch, files))
    )


def _make_unreachable(source: RowSource, reason: str) -> DataError:
    message = f"there is no file or folder {source.path} here, and the hub dataset of that name cannot be used: {reason}"
    remedy = (
        f"a local folder: write ./ before it, and create it (relative paths start at {Path.cwd()}); "
        "a hub dataset: check the name, the revision and the network, and HF_TOKEN in the environment for a private or gated one"
    )
    revision = f"revision={source.revision}" if source.revision else ""
    return DataError(message, source.path, revision, remedy)


# Addresses


def _find_at_address(source: RowSource) -> SourceFiles:
    """Find the file, or the files of a pattern or folder, at an fsspec address. Raises DataError."""
    with _convert_client_errors(source.path):
        from fsspec.core import url_to_fs

        require_known_hosts(source.path)
        fs, path = url_to_fs(source.path)
        # Another process may have written files since the last listing.
        fs.invalidate_cache()
        path, left_out = str(path), tuple[str, ...]()
        root, before_query = path.rstrip("/"), path.partition("?")[0]
        if path.startswith(("http://", "https://")) and detect_kind(before_query) and not glob.has_magic(before_query):
            # fsspec would read the file for links to find out whether it is a folder.
            paths = [path]
        elif glob.has_magic(path):
            paths = sorted(name for name in fs.glob(path) if fs.isfile(name))
        elif not fs.isdir(path):
            paths = [path]
        else:
            names = [str(name).removeprefix(f"{root}/") for name in fs.find(root)]
            chosen, left_out = _choose_files(
                names, lambda name: bytes(fs.cat_file(f"{root}/{name}")), source.subset, source.split, source.path
            )
            paths = [f"{root}/{name}" for name in chosen]
        # The address of each file, its size if the storage reports it, and a text that changes with its content.
        versions: dict[str, tuple[str, int | None, str]] = {}
        for path in paths:
            name, info = str(fs.unstrip_protocol(path)), fs.info(path)
            if info.get("size") == 0:
                refuse("the data file is empty", name, "add rows to it")
            version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None), None)
            if version is None:
                remedy = "download it, and set the source's path to the copy"
                refuse("the storage does not tell when this file changes", name, remedy)
            versions[path] = name, info.get("size"), version
    if not paths:
        refuse("no file matches the pattern", source.path, "check the address")
    return SourceFiles(
        tuple(name for name, _, _ in versions.values()),
        left_out,
        None,
        lambda: json.dumps([*versions.values()]),
        lambda: tuple(_fetch_address(fs, path, *version) for path, version in versions.items()),
    )


def _fetch_address(fs: Any, path: str, name: str, size: int | None, version: str) -> DataFile:
    """Download a file that is not in the cache."""
    # Do not use the address as the name, because it may be longer than a file name can be.
    folder = source_folder("address", name, size, version)
    target, partial = folder / "rows", folder / "rows.partial"
    with convert_os_errors(folder), ExitStack() as stack:
        if not target.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(wait_and_hold(folder / ".lock", f"fetches {name}", redacted_command_line()))
        if not target.exists():
            stack.callback(partial.unlink, missing_ok=True)
            with _convert_client_errors(name):
                fs.get_file(path, str(partial))
            num_bytes = partial.stat().st_size
            if num_bytes == 0 or (size is not None and num_bytes != size):
                message = f"the download is empty or incomplete: {num_bytes:,} of {size or num_bytes:,} bytes"
                refuse(message, name, "try again when no program is writing the file")
            partial.replace(target)
        mark_used(folder)
    return DataFile(target, name)


@contextmanager
def _convert_client_errors(address: str) -> Iterator[None]:
    """Convert the many types of exceptions that clients of storages raise."""
    remedy = access_remedy(address)
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("there is no such data file", address, remedy=remedy) from error
    except Exception as error:
        if is_full(error):
            raise
        message = f"the data cannot be read: {type(error).__name__}: {str(error)[:200]}"
        raise DataError(message, address, remedy=remedy) from error
