from __future__ import annotations

from rank_runs import nvme_runs, offload_runs, pytest_collection_modifyitems, run_ranks, runs

__all__ = ["nvme_runs", "offload_runs", "pytest_collection_modifyitems", "run_ranks", "runs"]
