"""Scores on disk: the log-probability of each trained token of packed rows under one set of weights.

    <root>/scores/<key>/             0700
      00000000-00000016.shard        micro-batches 0 to 15
      log_probs.f32                  all of them, once the pass is complete, in order of the rows

Each file holds little-endian fp32 values and their XXH3-128 digest. The key is the digest of everything that a score depends on,
so nothing is computed twice, and no scores are mistaken for others. No torch: the submit side reads scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from launcher import atomic_files
from launcher.data.cache_dir import cache_root
from launcher.errors import DataError, Problem

FORMAT_VERSION = 2
LOG_PROBS = "log_probs.f32"

_DTYPE = np.dtype("<f4")
_DIGEST_BYTES = xxhash.xxh3_128().digest_size
_SHARD = re.compile(r"(\d{8})-(\d{8})\.shard")


@dataclass(frozen=True)
class ScoreKey:
    """Everything that scores depend on.

    `weights` and `data` are digests; `rows` is the digest of the row indices, empty for all rows. `kernels` names the kernel
    packages with their versions.
    """

    weights: str
    data: str
    rows: str
    micro_batch_size: int
    dtype: str
    attention: str
    device: str
    torch: str
    transformers: str
    kernels: str = ""

    def digest(self) -> str:
        """Return the hex digest, which names the folder."""
        parts = {"format": FORMAT_VERSION, **asdict(self)}
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


class ScoreStore:
    """The scores of one key: written in shards, complete once log_probs.f32 exists.

    Two passes may write it at once: each file appears only when complete, and both passes compute the same values.
    """

    def __init__(self, key: ScoreKey, root: Path | None = None) -> None:
        """`root` is the launcher's cache by default."""
        self.folder = (root or cache_root()) / "scores" / key.digest()

    def read(self) -> np.ndarray | None:
        """Return all log-probabilities, fp32 [num_labels]; None if the pass is incomplete, or they are damaged."""
        if not self.folder.exists():
            return None
        return _read(self.folder / LOG_PROBS)

    def find_missing(self, num_labels: np.ndarray) -> list[list[int]]:
        """Return the ranges [start, stop) of micro-batches without an intact shard; remove damaged shards.

        `num_labels` are the numbers of trained tokens of the micro-batches, int64 [num_micro_batches].

        Raises:
            OSError: if the folder cannot be made or read.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.read() is not None:
            return []
        is_missing = np.ones(len(num_labels), dtype=bool)
        for path, start, stop in self._shards():
            values = _read(path)
            if values is None or len(values) != num_labels[start:stop].sum():
                path.unlink(missing_ok=True)
            else:
                is_missing[start:stop] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_missing, [False]]).astype(np.int8)))
        return edges.reshape(-1, 2).tolist()

    def commit(self, start: int, stop: int, log_probs: Sequence[np.ndarray]) -> None:
        """Write the log-probabilities of the micro-batches start..stop - 1 as one shard; write nothing for an empty range."""
        if start < stop:
            _write(self.folder / f"{start:08d}-{stop:08d}.shard", np.concatenate(log_probs))

    def complete(self, num_labels: np.ndarray) -> None:
        """Join all shards into log_probs.f32, and remove them.

        Raises:
            OSError: if a file cannot be written; the shards stay.
            DataError: if shards are missing or damaged.
        """
        ends = np.concatenate([[0], np.cumsum(num_labels)])
        log_probs, is_scored = np.zeros(ends[-1], _DTYPE), np.zeros(len(num_labels), dtype=bool)
        for path, start, stop in self._shards():
            if (values := _read(path)) is not None:
                log_probs[ends[start] : ends[stop]] = values
                is_scored[start:stop] = True
        # Another pass may have completed the scores meanwhile, and removed the shards.
        if self.read() is None:
            if not is_scored.all():
                message = f"scores of micro-batch {int(np.argmin(is_scored))} are missing or damaged"
                raise DataError(Problem(message, str(self.folder), remedy="repeat the command: it computes what is missing"))
            _write(self.folder / LOG_PROBS, log_probs)
        for path, *_ in self._shards():
            path.unlink(missing_ok=True)

    def _shards(self) -> list[tuple[Path, int, int]]:
        """Return path, start and stop of each shard, in order."""
        matches = ((path, _SHARD.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [(path, int(match[1]), int(match[2])) for path, match in matches if match is not None]


def _write(path: Path, values: np.ndarray) -> None:
    content = values.astype(_DTYPE, copy=False).tobytes()
    atomic_files.write_bytes(path, content + xxhash.xxh3_128_digest(content), mode=0o600)


def _read(path: Path) -> np.ndarray | None:
    """Return the values in a file; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    values, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return np.frombuffer(values, _DTYPE) if xxhash.xxh3_128_digest(values) == digest else None
