"""The store on a disk that is really full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hand_made
import pytest
from missing_program import skip_or_fail

from launcher import atomic_files
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.plan.quantities import format_size

DISK = 2**20
SHARD = b"x" * 300_000


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints folder of a run on a disk of 1 MiB."""
    if os.geteuid():
        skip_or_fail("only root can mount a small disk")
    options = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs"]
    subprocess.run(["mount", *options, tmp_path], check=True, capture_output=True, timeout=10)
    try:
        yield tmp_path / "checkpoints"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True, timeout=10)


def save(root: Path, step: int, shard: bytes = SHARD, needed_bytes: int = 1) -> Path:
    return hand_made.checkpoint(root, step, files={store.shard_name(0): shard}, needed_bytes=needed_bytes)


def fill(root: Path) -> Path:
    """Fill the disk completely."""
    path = root / "filler"
    with pytest.raises(OSError, match="No space left"):
        path.write_bytes(b"0" * DISK)
    return path


def test_a_full_disk_names_the_shard_and_keeps_earlier_checkpoints(root: Path) -> None:
    first = save(root, 1)
    with pytest.raises(OSError, match="No space left") as error:
        save(root, 2, b"x" * DISK)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename.endswith(".saving-step-00000002-001/rank-00000.safetensors")
    assert store.get_latest(root).path == first
    assert store.verify(first) == []
    # The next save removes what the failed one wrote.
    assert store.verify(save(root, 3)) == []
    assert [checkpoint.step for checkpoint in store.list_checkpoints(root)] == [1, 3]


def test_a_full_disk_during_the_manifest_commits_nothing(root: Path) -> None:
    first = save(root, 1)
    saving = store.begin_save(root, step=2, attempt=1, needed_bytes=1)
    files = {store.shard_name(0): atomic_files.write_file(saving / store.shard_name(0), [SHARD])}
    filler = fill(root)
    with pytest.raises(OSError, match="No space left"):
        store.commit(saving, Manifest(step=2, world_size=1, plan_digest="d", attempt=1, files=files))
    assert [checkpoint.path for checkpoint in store.list_checkpoints(root)] == [first]
    filler.unlink()
    assert store.verify(save(root, 2)) == []


def test_checkpoints_to_be_pruned_do_not_count_as_free_space(root: Path) -> None:
    """The disk holds three shards: beside two, one of twice the size does not fit, although one will be pruned."""
    save(root, 1)
    save(root, 2)
    with pytest.raises(CheckpointError) as error:
        save(root, 3, SHARD * 2, needed_bytes=len(SHARD) * 2)
    (problem,) = error.value.problems
    available = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    assert f"needed 585.94 KiB, available {format_size(available)}" in problem.value
    assert f"free {format_size(600_000 - available)}" in problem.remedy
    assert store.prune(root, store.Retention(1)) == [root / "step-00000001"]
    assert store.verify(save(root, 3, SHARD * 2, needed_bytes=len(SHARD) * 2)) == []


def test_a_read_only_disk_is_readable(root: Path) -> None:
    first = save(root, 1)
    subprocess.run(["mount", "-o", "remount,ro", root.parent], check=True, capture_output=True, timeout=10)
    with pytest.raises(OSError, match="Read-only file system"):
        save(root, 2)
    assert store.get_latest(root).path == first
    assert store.verify(first, threads=2) == []
