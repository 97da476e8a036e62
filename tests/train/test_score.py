"""The score pass of a real ZeRO-3 engine compared with plain transformers, including after ranks are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import hand_made
import numpy as np
import pytest
import torch
from forked import require_exit
from forked_ranks import RankServer
from plan_fixtures import ConfigOf, facts_for
from transformers import AutoModelForCausalLM, LlamaConfig

from launcher.data.split import Split, write_split
from launcher.evaluate.document_losses import ScoreStore
from launcher.plan.launch_plan import DataFacts
from launcher.plan.planner import plan

VOCABULARY = 300
ROW_TOKENS = 64
Documents = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose random weights give predictions that are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=ROW_TOKENS,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Token ids and loss masks of documents of 3 to 30 tokens; the first token is never trained."""
    generator = np.random.default_rng(0)
    made = []
    for length in generator.integers(3, 31, size=200):
        trained = generator.integers(0, 2, size=length).astype(np.uint8)
        trained[0], trained[-1] = 0, 1
        made.append((generator.integers(0, VOCABULARY, size=length).astype(np.uint32), trained))
    return made


@pytest.fixture(scope="module")
def plain_log_probs(model_dir: Path, documents: Documents) -> list[np.ndarray]:
    """The log-probability of each trained token, computed per document by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    scores = []
    with torch.no_grad():
        for tokens, trained in documents:
            ids = torch.from_numpy(tokens.astype(np.int64))
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
            of_next = log_probs[:-1].gather(-1, ids[1:, None]).squeeze(-1)
            scores.append(of_next.numpy()[trained[1:].astype(bool)])
    return scores


@pytest.fixture(scope="module")
def packed(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> DataFacts:
    """The documents in order, in rows of at most ROW_TOKENS tokens."""
    rows: list[list[int]] = [[]]
    for number, (tokens, _) in enumerate(documents):
        if sum(len(documents[one][0]) for one in rows[-1]) + len(tokens) > ROW_TOKENS:
            rows.append([])
        rows[-1].append(number)
    return write_cache(tmp_path_factory.mktemp("packed"), documents, rows)


def write_cache(folder: Path, documents: Documents, rows: Sequence[Sequence[int]]) -> DataFacts:
    """Write a training split in which row r contains documents rows[r]; every third document is from the second source."""
    order = [number for row in rows for number in row]
    docs = np.concatenate([[0], np.cumsum([len(documents[number][0]) for number in order])])
    row_ends = np.cumsum([len(row) for row in rows])
    trained = [documents[number][1] for number in order]
    sources = np.asarray([int(number % 3 == 0) for number in order], np.uint16)
    labels = np.asarray([marks.sum() for marks in trained])
    digest = write_split(
        folder,
        [documents[number][0] for number in order],
        trained,
        rows=docs[np.concatenate([[0], row_ends])],
        docs=docs,
        columns={"source": sources, "num_trained": labels},
    )
    counts = {name: 1 for name, field in DataFacts.model_fields.items() if field.annotation is int}
    return DataFacts(cache_dir=str(folder), padding_frac=0.0, digest=f"{digest}-", **counts)


@pytest.fixture
def plan_for(config_of: ConfigOf, model_dir: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Write a plan for a given number of ranks, with the weights of `model_dir`."""

    def plan_for(num_ranks: int) -> Path:
        batch = (f"train.global_batch_size={num_ranks}", f"cluster.ranks_per_node={num_ranks}")
        config = config_of("model=tiny", "model.dtype=fp32", "run.name=scored", *batch)
        planned = plan(config, facts_for(config, working_dir=str(tmp_path)))
        facts = planned.model.model_copy(update={"path": str(model_dir), "has_weights": True})
        planned = hand_made.changed(planned, "model.init=pretrained", f"model.path={model_dir}")
        path = tmp_path / f"plan-{num_ranks}.json"
        path.write_text(planned.model_copy(update={"model": facts}).to_json())
        return path

    return plan_for


class Scored:
    """Runs the score pass and reads the stored scores."""

    def __init__(self, server: RankServer, plan_for: Callable[[int], Path], folder: Path) -> None:
        self._server, self._plan_for, self._folder = server, plan_for, folder

    def run(self, facts: DataFacts, num_ranks: int, root: str, kill_after: int | None = None) -> int:
        """Score in micro-batches of two rows; returns the exit code of rank 0."""
        arguments = [str(self._plan_for(num_ranks)), json.loads(facts.model_dump_json()), 2, str(self._folder / root), kill_after]
        ranks = self._server.run("score_ranks:score", [arguments] * num_ranks, self._folder / "ranks", deadline_s=400)
        if kill_after is None:
            assert not any(rank.code for rank in ranks), ranks[0].output[-3000:]
        return ranks[0].code

    def store(self, facts: DataFacts, root: str) -> ScoreStore:
        return ScoreStore("key", -(-Split.open(facts).num_rows // 2), self._folder / root)


@pytest.fixture
def scored(rank_server: RankServer, plan_for: Callable[[int], Path], tmp_path: Path) -> Scored:
    return Scored(rank_server, plan_for, tmp_path)


@pytest.mark.rest
def test_scores_equal_plain_transformers_document_by_document(
    scored: Scored, packed: DataFacts, documents: Documents, plain_log_probs: list[np.ndarray], tmp_path: Path
) -> None:
    expected = np.concatenate(plain_log_probs)
    # With near-uniform predictions, context leaking from another document would hardly show.
    assert expected.std() > 1
    scored.run(packed, 1, "one")
    one = scored.store(packed, "one").read()
    np.testing.assert_allclose(one, expected, rtol=0, atol=1e-4)
    unpacked = write_cache(tmp_path / "unpacked", documents, [[number] for number in range(len(documents))])
    scored.run(unpacked, 2, "unpacked")
    np.testing.assert_allclose(scored.store(unpacked, "unpacked").read(), one, rtol=0, atol=1e-5)


@pytest.mark.rest
def test_a_pass_without_optimizer_equals_plain_transformers(
    plan_for: Callable[[int], Path], packed: DataFacts, plain_log_probs: list[np.ndarray], tmp_path: Path
) -> None:
    """`data --scored` and `why` run this pass: an inference engine in separate processes, whose results are reused."""
    code = """
import json, sys
import numpy as np
from pathlib import Path
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.evaluate.document_losses import ScorePass, score_passes
from launcher.evaluate.weights import find_scored_weights
plan, facts = LaunchPlan.load(sys.argv[1]), DataFacts.model_validate_json(sys.argv[2])
passes = [ScorePass(title="all", facts=facts), ScorePass(title="some", facts=facts, rows=(4, 0, 2))]
weights = find_scored_weights(RunDir(Path(plan.run_dir)), plan, 0)
log_probs = score_passes(plan, weights, passes, lambda *_: None, 2)
shown = []
again = score_passes(plan, weights, passes, lambda *progress: shown.append(progress), 2)
assert not shown, "nothing is computed twice"
assert all(map(np.array_equal, log_probs, again))
np.savez(sys.argv[3], *log_probs)
"""
    out = tmp_path / "scores.npz"
    arguments = [str(plan_for(2)), packed.model_dump_json(), str(out)]
    environment = {**os.environ, "LAUNCHER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    require_exit(done)
    scores = np.load(out)
    np.testing.assert_allclose(scores["arr_0"], np.concatenate(plain_log_probs), rtol=0, atol=1e-4)
    in_rows = [Split.open(packed).row_docs(row) for row in (4, 0, 2)]
    some = np.concatenate([one for docs in in_rows for one in plain_log_probs[docs]])
    np.testing.assert_allclose(scores["arr_1"], some, rtol=0, atol=1e-4)
    assert not list((tmp_path / "cache/scores").glob(".*")), "nothing temporary is left"


@pytest.mark.rest
def test_a_pass_that_was_killed_gives_the_same_bytes(scored: Scored, packed: DataFacts) -> None:
    scored.run(packed, 1, "whole")
    store = scored.store(packed, "killed")
    assert len(store.shards) == 33
    kill_after = Random().randint(2, 15)
    print(f"rank 0 is killed after {kill_after} micro-batches")
    assert scored.run(packed, 2, "killed", kill_after) != 0
    assert 0 < len(store.list_missing()) < 33
    scored.run(packed, 2, "killed")
    assert store.read().tobytes() == scored.store(packed, "whole").read().tobytes()
    # A complete pass computes nothing: rank 0 would be killed before its first micro-batch.
    assert scored.run(packed, 2, "killed", 0) == 0


@pytest.mark.rest
def test_evaluation_by_set_and_source_equals_the_scores(
    rank_server: RankServer, plan_for: Callable[[int], Path], packed: DataFacts, plain_log_probs: list[np.ndarray], tmp_path: Path
) -> None:
    arguments = [str(plan_for(2)), json.loads(packed.model_dump_json()), 2]
    first, second = rank_server.values("score_ranks:evaluate", [arguments] * 2, tmp_path / "ranks")
    assert first == second
    metrics = first["metrics"]
    by_source = {
        name: -np.concatenate([scores for number, scores in enumerate(plain_log_probs) if int(number % 3 == 0) == source])
        for source, name in enumerate(("first", "second"))
    }
    assert metrics["eval/all/loss"] == pytest.approx(-np.concatenate(plain_log_probs).mean(), abs=1e-5)
    for name, losses in by_source.items():
        assert metrics[f"eval/all/source/{name}/loss"] == pytest.approx(losses.mean(), abs=1e-5)
    split = Split.open(packed)
    in_rows = [split.row_docs(row) for row in (0, 2, 4)]
    three = np.concatenate([scores for docs in in_rows for scores in plain_log_probs[docs]])
    assert metrics["eval/three/loss"] == pytest.approx(-three.mean(), abs=1e-5)
    assert first["num_tokens"] == [sum(map(len, plain_log_probs)), len(three)]
