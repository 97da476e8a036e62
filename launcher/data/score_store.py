"""Scores on disk: the log-probability of each trained token of packed rows under one set of weights.

    <root>/scores/<key>/             0700
      012-of-256.f32                 a range of micro-batches: little-endian fp32, in order of the rows

The key is a digest of everything that a score depends on, so nothing is computed twice, and no scores are mistaken for others.
No torch: the submit side reads scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launcher import atomic_files
from launcher.data.cache_dir import cache_root

# A pass that is killed computes at most one shard per rank again.
MAX_SHARDS = 256
_DTYPE = np.dtype("<f4")


class ScoreStore:
    """The scores of one pass, in shards that each appear only when complete; two passes may write it at once.

    `shards` are their ranges of micro-batches.
    """

    def __init__(self, key: str, num_micro_batches: int, root: Path | None = None) -> None:
        """`root` is the launcher's cache by default."""
        self.folder = (root or cache_root()) / "scores" / key
        width = max(1, -(-num_micro_batches // MAX_SHARDS))
        self.shards = [range(first, min(first + width, num_micro_batches)) for first in range(0, num_micro_batches, width)]

    def list_missing(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [number for number in range(len(self.shards)) if not self._file(number).is_file()]

    def read(self) -> np.ndarray:
        """Return all log-probabilities, fp32 [num_labels], of a complete pass."""
        contents = [self._file(number).read_bytes() for number in range(len(self.shards))]
        return np.frombuffer(b"".join(contents), _DTYPE)

    def commit(self, number: int, log_probs: Sequence[np.ndarray]) -> None:
        """Write the log-probabilities of the micro-batches of a shard."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_bytes(self._file(number), np.concatenate(log_probs).astype(_DTYPE).tobytes(), mode=0o600)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:03d}-of-{len(self.shards):03d}.f32"
