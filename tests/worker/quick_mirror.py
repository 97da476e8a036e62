"""`python -m launcher.worker.sidecars.mirror_process` with shorter waits, and a disk that hangs if the test wants it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from launcher.worker.sidecars import mirror_process


class HangingFileSystem(LocalFileSystem):
    """A file system that hangs when state.json of a checkpoint is written in a mirror with the pipe `never-read`."""

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" not in mode and path.endswith("-state.json") and (pipe := Path(path).parents[2] / "never-read").exists():
            pipe.open("wb")
        return super().open(path, mode, **kwargs)


if __name__ == "__main__":
    fsspec.register_implementation("file", HangingFileSystem, clobber=True)
    mirror_process._LOOK_S, mirror_process._FIRST_PROGRESS_S = 0.1, 0.5
    sys.exit(mirror_process.main(sys.argv[1], int(sys.argv[2])))
