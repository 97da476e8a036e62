from __future__ import annotations

from rank_runs import pytest_collection_modifyitems, run_ranks, runs

__all__ = ["pytest_collection_modifyitems", "run_ranks", "runs"]
