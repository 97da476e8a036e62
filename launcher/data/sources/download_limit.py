"""Ends downloads that exceed their announced size or would fill the disk: a web server may send without end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

from fsspec.callbacks import Callback

from launcher.data.sources.row_values import refuse
from launcher.plan.quantities import format_size

# Space that a file of unknown size must leave free; on a small disk, a fraction of the disk.
_KEPT_FREE_BYTES, _KEPT_FREE_PART = 1 << 30, 20
# Number of bytes between two checks of the disk.
_LOOK_BYTES = 64 << 20


class DownloadLimit(Callback):
    """Counts the bytes of a download into `folder`, and raises DataError at the limit; `size` is None if unknown."""

    def __init__(self, name: str, size: int | None, folder: Path) -> None:
        super().__init__()
        self._name, self._announced, self._folder = name, size, folder
        self._looked_at = 0
        usage = shutil.disk_usage(folder)
        self._kept = min(_KEPT_FREE_BYTES, usage.total // _KEPT_FREE_PART)
        if size is not None and size > usage.free:
            self._refuse(f"the file does not fit on the disk of the cache: it has {format_size(size)}", usage.free)

    def set_size(self, size: int | None) -> None:
        # A client that starts over after a failure announces the size again.
        self.value = self._looked_at = 0
        super().set_size(size)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check()

    def absolute_update(self, value: int) -> None:
        super().absolute_update(value)
        self._check()

    def _check(self) -> None:
        if self._announced is not None:
            if self.value > self._announced:
                message = f"the download is longer than announced: more than {self._announced:,} bytes"
                refuse(message, self._name, "try again when no program is writing the file")
        elif self.value >= self._looked_at + _LOOK_BYTES:
            self._looked_at = self.value
            if (free := shutil.disk_usage(self._folder).free) < self._kept:
                self._refuse(f"the file does not fit on the disk of the cache: {format_size(self.value)} have arrived", free)

    def _refuse(self, message: str, free: int) -> NoReturn:
        refuse(
            f"{message}, and {format_size(free)} are free", self._name, "free more space, or set LAUNCHER_CACHE to another disk"
        )
