"""Which tensors of an export hold which parameters and buffers of the model; imports torch only if that must be found out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.errors import ConfigError
from launcher.models.weight_files import read_header, weight_files

Shape = tuple[int, ...]
_DEADLINE_S = 300


@dataclass(frozen=True)
class StoredNames:
    """The stored tensors (name, shape) of each parameter or buffer that files store differently from the model.

    `are_original` is false if it is not known how the original model's files store them.
    """

    tensors: dict[str, tuple[tuple[str, Shape], ...]]
    are_original: bool


def find_stored_names(built: Any, saved: Mapping[str, Shape]) -> StoredNames:
    """Find the stored names of `saved` parameters and buffers of a transformers model, which may be on the meta device."""
    from launcher.export.original_format import find_stored_tensors

    stored = find_stored_tensors(built, saved)
    return StoredNames({name: tuple(tensors) for name, tensors in (stored or {}).items()}, are_original=stored is not None)


def try_to_find_stored_names(folder: Path, trust_remote_code: bool, saved: Mapping[str, Shape], output: Path) -> None:
    """Write a StoredNames record by the config of a folder; the names of the model if transformers cannot build it.

    A separate process finds them, because this one may have imported transformers without torch.
    """
    command = [sys.executable, "-P", "-m", "launcher.export.stored_names", str(folder), str(output), str(int(trust_remote_code))]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, input=json.dumps(saved), text=True, capture_output=True, timeout=_DEADLINE_S)
    if not output.exists():
        json_records.write(output, StoredNames({}, are_original=False))


def stores_as_is(model: Path | Mapping[str, Any], saved: Mapping[str, Shape]) -> bool:
    """Return whether the base model's own files store all tensors under their names in the model."""
    if not isinstance(model, Path):
        return False
    try:
        files = [file for file in weight_files(model, with_pickled=False) if file.is_file()]
        return saved.keys() <= {name for file in files for name in read_header(file)}
    except (ConfigError, OSError):
        return False


def main(folder: str, output: str, trust_remote_code: str) -> None:
    """Run as a process that `try_to_find_stored_names` starts; reads the names and shapes of the saved tensors from stdin."""
    from launcher.export.parity import build_on_meta

    saved = {name: tuple(shape) for name, shape in json.load(sys.stdin).items()}
    json_records.write(Path(output), find_stored_names(build_on_meta(Path(folder), trust_remote_code == "1"), saved))


if __name__ == "__main__":
    main(*sys.argv[1:])
