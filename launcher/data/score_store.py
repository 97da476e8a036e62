"""Scores on disk: the log-probability of each trained token of packed rows under one set of weights.

    <root>/scores/<key>/             0700
      00000000-00000016.shard        micro-batches 0 to 15: log-probabilities in order (fp32), and their XXH3-128 digest
      log_probs.f32                  all of them, once the pass is complete: little-endian fp32, in order of the rows
      meta.json                      written last: what the scores belong to, the size and digest of log_probs.f32

The key is the digest of everything that a score depends on, so nothing is computed twice, and no scores are mistaken for others.
No torch: the submit side reads scores.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from launcher import atomic_files
from launcher.data.cache_dir import cache_root
from launcher.errors import DataError, Problem

FORMAT_VERSION = 1
LOG_PROBS = "log_probs.f32"
META = "meta.json"

_DTYPE = np.dtype("<f4")
_DIGEST_BYTES = xxhash.xxh3_128().digest_size
_SHARD = re.compile(r"(\d{8})-(\d{8})\.shard")
_READ_VALUES = 1 << 21


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
    """The scores of one key: written in shards, complete once meta.json exists.

    Two passes may write it at once: each file appears only when complete, and both passes compute the same values.
    """

    def __init__(self, key: ScoreKey, root: Path | None = None) -> None:
        """`root` is the launcher's cache by default."""
        self.key = key
        self.folder = (root or cache_root()) / "scores" / key.digest()

    def read(self) -> np.ndarray | None:
        """Return all log-probabilities as a memory map, fp32 [num_labels]; None if the pass is incomplete, or damaged.

        Raises:
            DataError: if another user could have written them.
        """
        if not self.folder.exists():
            return None
        try:
            meta = json.loads((self.folder / META).read_bytes())
            entry = atomic_files.FileEntry(**meta["log_probs"])
            path = self.folder / LOG_PROBS
            if meta["key"] != asdict(self.key) or path.stat().st_size != entry.size:
                return None
            log_probs = np.memmap(path, _DTYPE, "r") if entry.size else np.empty(0, _DTYPE)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return log_probs if _digest(_chunks(log_probs)) == entry.xxh3_128 else None

    def find_missing(self, num_labels: np.ndarray) -> list[list[int]]:
        """Return the ranges [start, stop) of micro-batches without an intact shard; remove damaged shards.

        `num_labels` are the numbers of trained tokens of the micro-batches, int64 [num_micro_batches].

        Raises:
            DataError: if another user could have written the folder.
            OSError: if the folder cannot be made or read.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.read() is not None:
            return []
        is_scored = np.zeros(len(num_labels), dtype=bool)
        for path, start, stop in self._shards():
            if (
                stop <= len(num_labels)
                and not is_scored[start:stop].any()
                and _read_shard(path, num_labels[start:stop]) is not None
            ):
                is_scored[start:stop] = True
            else:
                path.unlink(missing_ok=True)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], is_scored, [True]]).astype(np.int8)))
        return edges.reshape(-1, 2).tolist()

    def commit(self, start: int, stop: int, log_probs: Sequence[np.ndarray]) -> None:
        """Write the log-probabilities of the micro-batches start..stop - 1 as one shard; write nothing for an empty range."""
        if start == stop:
            return
        values = np.concatenate(log_probs).astype(_DTYPE, copy=False).tobytes()
        atomic_files.write_bytes(
            self.folder / f"{start:08d}-{stop:08d}.shard", values + xxhash.xxh3_128_digest(values), mode=0o600
        )

    def complete(self, num_labels: np.ndarray) -> None:
        """Join all shards into log_probs.f32, write meta.json, and remove the shards.

        Raises:
            OSError: if a file cannot be written; the shards stay.
            DataError: if shards are missing or damaged.
        """
        if self.read() is None:
            partial = self.folder / f".{LOG_PROBS}.{secrets.token_hex(4)}"
            try:
                entry = atomic_files.write_file(partial, self._read_in_order(num_labels))
                atomic_files.rename(partial, self.folder / LOG_PROBS)
            except DataError:
                # Another pass may have completed the scores meanwhile, and removed the shards.
                if self.read() is None:
                    raise
                return
            finally:
                partial.unlink(missing_ok=True)
            atomic_files.write_json(self.folder / META, {"key": asdict(self.key), "log_probs": asdict(entry)})
        for path, *_ in self._shards():
            path.unlink(missing_ok=True)

    def _read_in_order(self, num_labels: np.ndarray) -> Iterator[memoryview]:
        position = 0
        # Passes on other numbers of ranks write other shards, which may overlap.
        for path, start, stop in self._shards():
            values = _read_shard(path, num_labels[start:stop]) if start <= position < stop else None
            if values is not None:
                yield values[int(num_labels[start:position].sum()) :].data
                position = stop
        if position != len(num_labels):
            message = f"scores of micro-batch {position} are missing or damaged"
            raise DataError(Problem(message, str(self.folder), remedy="repeat the command: it computes what is missing"))

    def _shards(self) -> list[tuple[Path, int, int]]:
        """Return path, start and stop of each shard, in order."""
        matches = ((path, _SHARD.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [(path, int(match[1]), int(match[2])) for path, match in matches if match is not None]


def _read_shard(path: Path, num_labels: np.ndarray) -> np.ndarray | None:
    """Return the log-probabilities in a shard; None if it is damaged, or if another pass has completed the scores."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    values, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if len(values) != _DTYPE.itemsize * int(num_labels.sum()) or xxhash.xxh3_128_digest(values) != digest:
        return None
    return np.frombuffer(values, _DTYPE)


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), _READ_VALUES):
        yield values[start : start + _READ_VALUES]


def _digest(chunks: Iterable[np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
