"""The environment and setup of a rank's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launcher.worker.ranks.rank_env import allocator_defaults

# Prints the page faults of five allocations of a large tensor, after a first one.
_PAGE_FAULTS = """
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = lambda: [torch.ones(2**23) for _ in range(4)] + [torch.ones(2**25)]
tensors()
before = faults()
for _ in range(5):
    tensors()
print(faults() - before)
"""


@pytest.mark.rest
def test_tensors_in_main_memory_take_the_place_of_those_before() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept = _count_page_faults({**plain, **allocator_defaults(plain, "cpu")})
    assert kept < 0.1 * _count_page_faults(plain)


@pytest.mark.parametrize(
    ("library", "threshold"),
    [(("glibc", "2.41"), 2**28), (("glibc", "2.35"), 2**28), (("glibc", "2.31"), 2**25), (("", ""), 2**25)],
)
def test_the_c_library_gets_a_threshold_that_it_accepts(
    library: tuple[str, str], threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    assert allocator_defaults({}, "cpu")["MALLOC_MMAP_THRESHOLD_"] == str(threshold)


def test_what_the_user_has_set_stays() -> None:
    assert "MALLOC_TRIM_THRESHOLD_" not in allocator_defaults({"MALLOC_TRIM_THRESHOLD_": "1"}, "cpu")
    assert allocator_defaults({}, "cuda") == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_defaults({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "cuda") == {}


def _count_page_faults(environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _PAGE_FAULTS]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout)
