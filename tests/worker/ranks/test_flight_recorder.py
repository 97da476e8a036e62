"""The agent requests a silent rank's flight recorder through a pipe, and reports the collective in which the ranks hang."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import hand_made
import pytest
import torch
from forked_ranks import RankServer
from pace import wait_for

from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.ranks.flight_recorder import FlightRecorder
from launcher.worker.ranks.fork_server import differing
from launcher.worker.ranks.hung_collective import read_dump

STALL_S = 600.0
NODES, RANKS_PER_NODE = 64, 8


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "demo", Attempt(None, nodes=("n1", "n2", "n3")))


def test_the_collective_is_named_that_ranks_wait_in_and_who_has_not_called_it(
    rank_server: RankServer, run: RunDir, tmp_path: Path
) -> None:
    """Three ranks over gloo leave real records; the last has not called what the others wait in, and later stops answering."""
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 3, STALL_S)
    environ.update(recorder.variables)
    assert differing(environ, {}) == [], "the fork server may import without them"
    values: list[list[None]] = []
    arguments = [[2, str(tmp_path)]] * 3
    ranks = threading.Thread(
        target=lambda: values.append(
            rank_server.values("waiting_ranks:wait_without", arguments, tmp_path / "ranks", environment=environ)
        )
    )
    ranks.start()
    try:
        wait_for("the ranks", lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        title = "ranks 0-1 on n1, n2 wait in collective 3 of process group 0 (default_pg), all_gather of 3072 elements"

        def explain(*asked: int) -> str:
            recorder.request(asked)
            return recorder.explain()

        # Rank 0 or rank 1 may not have called it yet.
        wait_for("the others", lambda: explain(0, 1) == f"{title}; rank 2 on n3 left no record")
        wait_for("all ranks", lambda: explain(0, 1, 2) == f"{title}; rank 2 on n3 has not called it")
    finally:
        (tmp_path / "go").touch()
        ranks.join()
        recorder.close(environ)
    assert values == [[None] * 3], "recording changes nothing"
    published = run.attempt(1) / "collectives"
    assert {path.name for path in published.glob("rank-*")} == {"rank-0", "rank-1", "rank-2"}, "for torchfrtrace"
    # Records from before a restart are too old to be used with others.
    (summaries,) = published.glob("summary-*.json")
    (published / "summary-later.json").write_text('{"ranks": {}, "members": {}}')
    reader = FlightRecorder(run, 1, 3, STALL_S)
    assert reader.explain().startswith(title)
    os.utime(summaries, (0, 0))
    assert reader.explain() == ""
    reader.close({})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rank_with_nccl_answers_by_itself(rank_server: RankServer, run: RunDir, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 1, STALL_S)
    environ.update(recorder.variables)
    function, arguments = "waiting_ranks:record_on_a_gpu", [[str(tmp_path)]]
    rank = threading.Thread(target=lambda: rank_server.values(function, arguments, tmp_path / "ranks", environment=environ))
    rank.start()
    written = run.attempt(1) / "collectives" / "rank-0"
    try:
        wait_for("the rank", (tmp_path / "ready-0").exists)
        recorder.request([0])
        wait_for("its record", written.exists)
        assert recorder.explain() == "", "it waits in no collective"
    finally:
        (tmp_path / "go").touch()
        rank.join()
        recorder.close(environ)
    recorded = read_dump(written.read_bytes())
    assert recorded is not None
    ((group, (summed,)),) = recorded[0].items()
    assert (group, summed.name, summed.num_elements, summed.is_completed) == ("0 (default_pg)", "all_reduce", 1024, True)
    assert recorded[1][group] == (0,)
