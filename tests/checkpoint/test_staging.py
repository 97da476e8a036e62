from __future__ import annotations

import psutil
import pytest

from launcher.checkpoint import staging

GIB = 2**30


@pytest.mark.parametrize(
    ("files", "left_gib"),
    [
        ({}, 100),
        ({"job/memory.max": "max", "job/memory.current": "5"}, 100),
        ({"job/memory.max": 40 * GIB, "job/memory.current": 30 * GIB, "job/memory.stat": "anon 1\nfile 2\n"}, 10),
        # After a model is read or a checkpoint written, the page cache fills the rest of a job's memory.
        (
            {
                "job/memory.max": 40 * GIB,
                "job/memory.current": 39 * GIB,
                "job/memory.stat": f"anon 1\ninactive_file {29 * GIB}\n",
            },
            30,
        ),
        ({"memory.max": 20 * GIB, "memory.current": 15 * GIB, "memory.stat": "", "job/memory.max": "max"}, 5),
    ],
)
def test_available_memory_respects_limits_of_all_cgroups(tmp_path, monkeypatch, files, left_gib):
    free = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    (tmp_path / "own").write_text("0::/job/step_0\n")
    (tmp_path / "job" / "step_0").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_text(str(content))
    monkeypatch.setattr(staging, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(staging, "CGROUPS", tmp_path)
    assert staging.available_bytes() == left_gib * GIB
