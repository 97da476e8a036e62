"""Datasets on S3 and on the Hub, read by real clients in separate processes from servers that the tests start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dataset_hub import DatasetHub, running_dataset_hub
from mirror_tools import S3, make_bucket, running_s3
from source_folders import SPLITS, SUBSETS, Files, row

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.reading import check_sources

pytestmark = pytest.mark.rest


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3") / "server.log") as s3:
        make_bucket(s3)
        yield s3


CODE = """
import json, sys
from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.reading import check_sources
from launcher.data.sources.reading import describe_origin, read_documents, compute_source_digest
from launcher.errors import DataError
try:
    source = Source.model_validate_json(sys.argv[1])
    rows = [[d.where, d.text] for d, _ in read_documents(source)]
    print(json.dumps([compute_source_digest(source), rows, describe_origin(source)]))
except DataError as error:
    print(error)
    sys.exit(2)
"""


def run_elsewhere(source: Source, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    command = [sys.executable, "-c", CODE, source.model_dump_json()]
    return subprocess.run(command, env={**inherited, **environ}, capture_output=True, text=True, timeout=100)


def read_elsewhere(source: Source, environ: dict[str, str]) -> tuple[str, Any]:
    """Return digest and rows, or 'refused' and the error, from a new process: clients read the environment only once."""
    done = run_elsewhere(source, environ)
    if done.returncode == 2:
        return "refused", done.stdout
    assert done.returncode == 0, done.stderr
    digest, rows, _ = json.loads(done.stdout)
    return digest, rows


def test_rows_from_s3(s3: S3) -> None:
    code = f"import fsspec; fsspec.filesystem('s3').pipe('{s3.bucket}/rows/a.jsonl', {row('a').encode()!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **s3.environment}, check=True, timeout=60)
    source = Source(path=f"s3://{s3.bucket}/rows")
    digest, rows = read_elsewhere(source, s3.environment)
    assert rows == [[f"s3://{s3.bucket}/rows/a.jsonl:1", "a"]]
    assert read_elsewhere(source, s3.environment)[0] == digest
    refused = read_elsewhere(Source(path=f"s3://{s3.bucket}/gone.jsonl"), s3.environment)
    assert refused[0] == "refused"
    assert "there is no such data file" in refused[1]


@pytest.fixture
def hub() -> Iterator[DatasetHub]:
    with running_dataset_hub() as hub:
        yield hub


def hub_environment(hub: DatasetHub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}


def as_bytes(files: Files) -> dict[str, bytes]:
    return {name: content.encode() for name, content in files.items()}


def test_a_hub_dataset_with_split_subset_and_revision(hub: DatasetHub, tmp_path: Path) -> None:
    environ = hub_environment(hub, tmp_path)
    old = hub.commit(as_bytes({**SPLITS, "load.py": "raise SystemExit('code was run')"}), "main", "v1")
    source = Source(path="owner/name")
    assert check_sources(DataSection(sources=(source,))) == []
    digest, rows = read_elsewhere(source, environ)
    origin = json.loads(run_elsewhere(source, environ).stdout)[2]
    assert (origin["commit"], origin["num_files"], origin["left_out"]) == (old, 2, ["load.py", "test.jsonl"])
    assert rows == [["owner/name/train-0.jsonl:1", "a"], ["owner/name/train-1.jsonl:1", "b"]]
    assert old in digest
    assert not any(path.endswith(("load.py", "test.jsonl")) for path in hub.requests)

    hub.commit(as_bytes(SUBSETS), "main")
    later, rows = read_elsewhere(source.model_copy(update={"subset": "main", "split": "held"}), environ)
    assert rows == [["owner/name/main/second.jsonl:1", "h"]]
    assert later != digest
    for revision in (old, "v1"):
        assert read_elsewhere(source.model_copy(update={"revision": revision, "split": "test"}), environ)[1] == [
            ["owner/name/test.jsonl:1", "t"]
        ]
    error = read_elsewhere(source, environ)[1]
    assert "several subsets: main, socratic" in error
    assert "where:  owner/name" in error


def test_offline_only_downloaded_hub_files_are_used(hub: DatasetHub, tmp_path: Path) -> None:
    environ = hub_environment(hub, tmp_path)
    hub.commit(as_bytes(SPLITS), "main")
    online = read_elsewhere(Source(path="owner/name"), environ)
    offline = {**environ, "HF_HUB_OFFLINE": "1"}
    assert read_elsewhere(Source(path="owner/name"), offline) == online
    refused, error = read_elsewhere(Source(path="owner/name", split="test"), offline)
    assert refused == "refused"
    assert "the hub cannot be reached" in error


def test_a_busy_hub_falls_back_to_downloaded_files(hub: DatasetHub, tmp_path: Path) -> None:
    environ = hub_environment(hub, tmp_path)
    hub.commit(as_bytes(SPLITS), "main")
    online = read_elsewhere(Source(path="owner/name"), environ)
    hub.fails_with = 503
    done = run_elsewhere(Source(path="owner/name"), environ)
    assert json.loads(done.stdout)[:2] == list(online)
    assert f"owner/name is read at the last known commit {hub.revisions['main']}" in done.stderr
    # A denied dataset is not a temporary failure, so there is no fallback.
    hub.fails_with = 403
    refused, error = read_elsewhere(Source(path="owner/name"), environ)
    assert (refused, "the hub answered with 403" in error) == ("refused", True)


def test_a_missing_hub_dataset_is_reported(hub: DatasetHub, tmp_path: Path) -> None:
    hub.commit({"load.py": b"raise SystemExit('code was run')"}, "main")
    environ = hub_environment(hub, tmp_path)
    error = read_elsewhere(Source(path="owner/other"), environ)[1]
    assert "the hub answered with 401 (RepositoryNotFoundError)" in error
    assert "there is no file or folder owner/other here" in error
    assert "RevisionNotFoundError" in read_elsewhere(Source(path="owner/name", revision="v9"), environ)[1]
    error = read_elsewhere(Source(path="owner/name"), environ)[1]
    assert "holds no data file" in error
    assert "Code that builds a dataset is never run" in error


def test_rows_by_an_hf_address(hub: DatasetHub, tmp_path: Path) -> None:
    environ = hub_environment(hub, tmp_path)
    hub.commit(as_bytes({f"data/{name}": content for name, content in SPLITS.items()}), "main")
    folder, pattern = (Source(path=f"hf://datasets/owner/name{path}") for path in ("/data", "@main/data/train-*.jsonl"))
    digest, rows = read_elsewhere(folder, environ)
    assert rows == [[f"hf://datasets/owner/name/data/train-{i}.jsonl:1", text] for i, text in enumerate("ab")]
    assert [text for _, text in read_elsewhere(pattern, environ)[1]] == ["a", "b"]
    assert read_elsewhere(folder, environ)[0] == digest
    hub.commit(as_bytes({"data/train-0.jsonl": row("c")}), "main")
    changed, rows = read_elsewhere(folder, environ)
    assert changed != digest
    assert [text for _, text in rows] == ["c"]
