"""Two real ranks agree on whether there is time for a save."""

from __future__ import annotations

from pathlib import Path

from forked_ranks import RankServer


def test_ranks_save_before_stopping_only_where_all_have_time(rank_server: RankServer, tmp_path: Path) -> None:
    first, second = rank_server.values("train_ranks:judge_saves", [[], []], tmp_path)
    assert first == second
    assert {name for name, fits in first.items() if not fits} == {
        *("long", "waited", "one is slow", "one has waited", "one was not asked"),
    }
    assert len(first) == 12
