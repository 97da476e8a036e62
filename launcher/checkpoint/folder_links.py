"""The files in a model folder that may be copied: regular files in the folder itself, or blobs in the Hub's cache.

In a folder from another user, a link such as `LICENSE -> ~/.ssh/id_rsa` would copy a private file from this machine into the
export, the Hub repository or the mirror.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import CheckpointError, Problem

# The files that an export and a mirror copy in addition to the weights.
COPIED = (
    *(
        "*.json",
        "*.jinja",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.py",
        "tokenizer*",
        "vocab.*",
        "merges*",
        "spiece*",
        "sentencepiece*",
    ),
    *("chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*", "README.md"),
)

# Files that are loaded: through a link, an export would write the tensors of another file on this machine.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def link_problems(folder: Path, paths: Iterable[Path] | None = None) -> Iterator[Problem]:
    """Yield a problem for each of `paths`, and each file below them, that is not a regular file of the folder.

    Without `paths`, it checks the weights, the files that an export or a mirror may copy, and everything that is not a file:
    reading a pipe would never end.
    """
    if paths is None:
        paths = {path for pattern in (*COPIED, *_WEIGHTS) for path in folder.glob(pattern)} | {
            p for p in folder.iterdir() if _is_special(p)
        }
    for path in sorted(paths):
        for file in _with_content(path):
            if reason := _refusal(folder, file):
                name = file.relative_to(folder)
                yield Problem(
                    f"the file {name} {reason}",
                    where=str(file),
                    value=str(name),
                    remedy="replace it with a copy of the intended file, or remove it",
                )


@contextmanager
def open_file(folder: Path, source: str | Path) -> Iterator[io.FileIO]:
    """Open a file of a model folder, and check what was opened, because a path can be replaced after a check.

    Raises:
        CheckpointError: if it is neither the folder's own file nor a blob.
    """
    # So that a pipe without a writer does not block.
    with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        opened = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not _is_allowed(folder, opened):
            message = f"the file {Path(source).name} was replaced by a link to a file outside the folder while it was copied"
            raise CheckpointError(message, where=str(source), value=str(opened), remedy="use a folder that only you can write to")
        yield file


def copy_file(folder: Path, source: str | Path, target: str | Path) -> None:
    """Copy a file of a model folder; see `open_file`."""
    with open_file(folder, source) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy)


def _with_content(path: Path) -> Iterator[Path]:
    """Yield the path and everything below it; a link to a folder is not followed."""
    yield path
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from _with_content(entry)


def _is_special(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device, or a link to one."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _refusal(folder: Path, file: Path) -> str:
    """Return why a file may not be copied, as text to follow its name; empty if it may."""
    try:
        target = file.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        # There is nothing to copy.
        return ""
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "is not a regular file"
    if target.is_relative_to(folder.resolve()) or (stat.S_ISREG(mode) and _is_allowed(folder, target)):
        return ""
    return f"is a link to a file outside the folder: {os.readlink(file)}" if file.is_symlink() else "is not in the folder"


def _is_allowed(folder: Path, file: Path) -> bool:
    """Return whether a file without links in its path is in the folder, or a blob of a cache of the Hub."""
    return file.is_relative_to(folder.resolve()) or any(_is_blob(file, cache) for cache in _hub_caches(folder))


def _hub_caches(folder: Path) -> Iterator[Path]:
    """Yield the Hub caches whose blobs a folder may link to: the cache that it is a snapshot in, and this user's."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshot = folder.resolve()
    if snapshot.parent.name == "snapshots":
        yield snapshot.parents[2]
    yield Path(HF_HUB_CACHE).resolve()


def _is_blob(target: Path, cache: Path) -> bool:
    """Return whether a file is a blob of one model or a blob that models share, by the layout of huggingface_hub."""
    parts = target.relative_to(cache).parts if target.is_relative_to(cache) else ()
    return len(parts) == 3 and (parts[0] == "blobs" or (parts[0].startswith("models--") and parts[1] == "blobs"))
