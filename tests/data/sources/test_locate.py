"""Folders with splits and subsets, for tests of local and remote sources."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from forked import require_exit
from http_server import Answer, Request, serving
from mirror_tools import S3, make_bucket, running_s3
from unusual_files import as_root, link_to_device, make_pipe

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.reading import check_sources, compute_source_digest, describe_origin, make_eval_source, read_documents
from launcher.errors import DataError, Problem

__all__ = ["as_root"]
# File text by path.
Files = dict[str, str]
# The dataset card of SUBSETS.
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/first*
  - split: held
    path: [main/second.jsonl]
- config_name: socratic
  data_dir: socratic
---
"""
# Web servers that provide more or less metadata, and downloads that are cut off


ROW, OTHER = b'{"text": "a"}\n', b'{"text": "b"}\n'


def row(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


SPLITS = {"train-0.jsonl": row("a"), "train-1.jsonl": row("b"), "test.jsonl": row("t"), "README.md": "# Rows"}
SUBSETS = {
    "README.md": CARD,
    "main/first.jsonl": row("m"),
    "main/second.jsonl": row("h"),
    "socratic/train.jsonl": row("s"),
    "socratic/test.jsonl": row("st"),
}


@dataclass
class DatasetHub:
    """The repository owner/name; `revisions` maps branches, tags and commits to commits, `commits` maps commits to files.

    If `fails_with` is an HTTP status, every answer has that status.
    """

    address: str = ""
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails_with: int | None = None

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit with these files; `names` point to it."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.revisions.update(dict.fromkeys((sha, *names), sha))
        return sha

    def _tree(self, sha: str, folder: str | None, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders in a folder, recursively or not."""
        root = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in self.commits[sha].items():
            parts = name.removeprefix(root).split("/")
            if not name.startswith(root):
                continue
            for depth in range(1, len(parts)):
                path = root + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[path] = {"type": "directory", "oid": sha, "size": 0, "path": path}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
        return list(entries.values())

    def answer(self, request: Request) -> Answer:
        path, query = request.path, request.query
        self.requests.append(path)
        if self.fails_with is not None:
            return self.fails_with, {}
        if match := re.fullmatch(r"/api/datasets/owner/name/tree/(\w+)(?:/(.+))?", path):
            return 200, self._tree(self.revisions[match[1]], match[2], "recursive=true" in query)
        if match := re.fullmatch(r"/api/datasets/owner/name(?:/revision/(\w+))?", path):
            sha = self.revisions.get(match[1] or "main")
            if sha is not None:
                siblings = [{"rfilename": name} for name in self.commits[sha]]
                return 200, {"id": "owner/name", "sha": sha, "siblings": siblings}
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if (match := re.fullmatch(r"/datasets/owner/name/resolve/(\w+)/(.+)", path)) and match[1] in self.revisions:
            sha = self.revisions[match[1]]
            content = self.commits[sha].get(match[2])
            if content is not None:
                return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}
            return 404, {}, {"X-Error-Code": "EntryNotFound"}
        return 401, {}, {"X-Error-Code": "RepoNotFound"}


@contextmanager
def running_dataset_hub() -> Iterator[DatasetHub]:
    hub = DatasetHub()
    with serving(hub.answer) as hub.address:
        yield hub


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def texts(source: Source) -> list[str]:
    return [document.text for document, _ in read_documents(source)]  # type: ignore[union-attr]


def problem_of(source: Source) -> Problem:
    with pytest.raises(DataError) as caught:
        texts(source)
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


MAIN = {name: content for name, content in SUBSETS.items() if name != "README.md"}
GLOBS = {
    "README.md": """---
configs:
- config_name: default
  data_files:
  - {split: here, path: "*.jsonl"}
  - {split: anywhere, path: "**/*.jsonl"}
  - {split: inside, path: "data/**"}
  - {split: one, path: "data/?.jsonl"}
---
""",
    "top.jsonl": row("top"),
    "data/i.jsonl": row("in"),
    "data/deep/x.jsonl": row("deep"),
}


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        (GLOBS, {"split": "here"}, ["top"]),
        (GLOBS, {"split": "anywhere"}, ["deep", "in", "top"]),
        (GLOBS, {"split": "inside"}, ["deep", "in"]),
        (GLOBS, {"split": "one"}, ["in"]),
        ({"b.jsonl": row("b"), "deep/a.jsonl": row("a")}, {}, ["b", "a"]),
        (SPLITS, {}, ["a", "b"]),
        (SPLITS, {"split": "test"}, ["t"]),
        ({"data/validation/x.jsonl": row("v"), "data/train/x.jsonl": row("a")}, {}, ["a"]),
        ({"rows_dev.jsonl": row("only")}, {}, ["only"]),
        ({"a.jsonl": row("a"), "notes.txt": "hidden", ".b.jsonl": row("hidden"), "dataset_infos.json": "{}"}, {}, ["a"]),
        ({"a.txt": "one\ntwo\n", "README.txt": "hidden"}, {}, ["one", "two"]),
        ({"a.jsonl": row("a"), "b.json": f"[{row('b')}]"}, {}, ["a", "b"]),
        (SUBSETS, {"subset": "main"}, ["m"]),
        (SUBSETS, {"subset": "main", "split": "held"}, ["h"]),
        (SUBSETS, {"subset": "socratic"}, ["s"]),
        (SUBSETS, {"subset": "socratic", "split": "test"}, ["st"]),
    ],
)
def test_the_files_of_a_folder_are_chosen_by_their_names(
    tmp_path: Path, files: Files, settings: dict[str, Any], expected: list[str]
) -> None:
    source = Source(path=str(write(tmp_path, files)), **settings)
    assert texts(source) == expected
    assert check_sources(DataSection(sources=(source,))) == []


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        ({"a.bin": "x", "b.py": "x"}, {}, "holds no data file (extensions: .bin, .py)"),
        ({"train.jsonl": row("a"), "a.jsonl": row("b")}, {}, "a.jsonl belongs to no split, but other files do (train.jsonl)"),
        ({"a.jsonl": row("a"), "b.jsonl.xz": "x", "c/d.zip": "x"}, {}, "in an unsupported compression: b.jsonl.xz, c/d.zip"),
        ({"test.jsonl": row("a"), "dev.jsonl": row("b")}, {}, "no split train (there are: validation, test)"),
        (SPLITS, {"split": "held"}, "no split held (there are: test, train)"),
        ({"a.jsonl": row("a")}, {"split": "test"}, "no file belongs to the split test"),
        (SPLITS, {"subset": "main"}, "no subset main"),
        (
            {"README.md": CARD.replace("first*", "third*"), **MAIN},
            {"subset": "main"},
            "matches the pattern main/third*",
        ),
        (SUBSETS, {}, "several subsets: main, socratic"),
        (SUBSETS, {"subset": "maine"}, "no subset maine (there are: main, socratic)"),
        ({"a.jsonl": row("a"), "b.jsonl": ""}, {}, "the data file is empty"),
    ],
)
def test_problems_of_a_folder_show_before_it_is_read(tmp_path: Path, files: Files, settings: dict[str, Any], words: str) -> None:
    source = Source(path=str(write(tmp_path, files)), **settings)
    (problem,) = check_sources(DataSection(sources=(source,)))
    assert words in problem.message
    assert (problem.where, problem.value) == ("data.sources[0].path", str(tmp_path))
    assert problem.remedy


def test_the_report_lists_files_read_and_left_out(tmp_path: Path) -> None:
    beside = {f"notes-{i:02}.txt": "x" for i in range(12)}
    source = Source(path=str(write(tmp_path, {**SPLITS, ".hidden.jsonl": row("h"), **beside})))
    origin = describe_origin(source)
    assert (origin["files"], origin["num_files"]) == ([f"{tmp_path}/train-0.jsonl", f"{tmp_path}/train-1.jsonl"], 2)
    assert (origin["left_out"], origin["num_left_out"]) == ([f"notes-{i:02}.txt" for i in range(10)], 13)
    assert origin["commit"] is None
    write(tmp_path, {"train-0.jsonl": row("c")})
    assert describe_origin(source)["digest"] != origin["digest"]
    assert describe_origin(Source(path=f"{tmp_path}/*.jsonl"))["num_left_out"] == 0


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", {"a.jsonl": row("a")})
    elsewhere = write(tmp_path / "elsewhere", {"b.jsonl": row("b")})
    (folder / "link").symlink_to(elsewhere)
    (folder / "same").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    assert texts(Source(path=str(folder))) == ["a", "b"]


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path, {"b.jsonl": row("b"), "a.jsonl": row("a"), "deep/c.jsonl": row("c"), "d.txt": "d"})
    assert texts(Source(path=f"{tmp_path}/*.jsonl")) == ["a", "b"]
    assert texts(Source(path=f"{tmp_path}/**/*.jsonl")) == ["a", "b", "c"]
    documents = [document for document, _ in read_documents(Source(path=f"{tmp_path}/[ab].jsonl"))]
    assert [document.where for document in documents] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]
    sources = (Source(path=f"{tmp_path}/*.csv"), Source(name="other", path=f"{tmp_path}/a.jsonl", split="train"))
    nothing, split = check_sources(DataSection(sources=sources))
    assert "no file matches" in nothing.message
    assert "do not apply to a path that names files" in split.message


def test_the_source_digest_depends_on_bytes_not_on_the_path(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", SPLITS), write(tmp_path / "two", SPLITS)
    assert compute_source_digest(Source(path=str(one))) == compute_source_digest(Source(path=str(two)))
    assert compute_source_digest(Source(path=str(one))) != compute_source_digest(Source(path=str(one), split="test"))
    write(two, {"train-1.jsonl": row("c")})
    assert compute_source_digest(Source(path=str(one))) != compute_source_digest(Source(path=str(two)))
    # With another extension, the same bytes mean different rows.
    write(tmp_path, {"a.json": row("a"), "a.txt": row("a")})
    assert compute_source_digest(Source(path=f"{tmp_path}/a.json")) != compute_source_digest(Source(path=f"{tmp_path}/a.txt"))


def test_the_held_out_source_is_read_like_the_others(tmp_path: Path) -> None:
    write(tmp_path, {**SPLITS, "dev.jsonl": row("d")})
    columns = {"prompt": "question"}
    alike = (Source(path="a.jsonl", columns=columns), Source(name="b", path="b.jsonl", columns=columns))
    held_out = make_eval_source(DataSection(sources=alike, eval_path=str(tmp_path)))
    assert held_out is not None
    assert held_out.columns == columns
    assert make_eval_source(DataSection(sources=alike)) is None
    plain = (Source(path="a.jsonl", format="text"), Source(name="b", path="b.jsonl"))
    for split, expected in ((None, "d"), ("test", "t"), ("train", "a")):
        held_out = make_eval_source(DataSection(sources=plain, eval_path=str(tmp_path), eval_split=split))
        assert held_out is not None
        assert (held_out.format, held_out.columns, texts(held_out)[0]) == ("auto", {}, expected)


def test_held_out_documents_of_a_sources_own_dataset_are_of_its_subset_and_revision() -> None:
    main = Source(path="owner/name", subset="main", revision="v1", columns={"prompt": "question"})
    other = Source(name="other", path="a.jsonl")
    held_out = make_eval_source(DataSection(sources=(other, main), eval_path="owner/name"))
    assert held_out is not None
    assert (held_out.subset, held_out.revision, held_out.columns) == ("main", "v1", main.columns)
    elsewhere = make_eval_source(DataSection(sources=(other, main), eval_path="owner/else"))
    assert elsewhere is not None
    assert (elsewhere.subset, elsewhere.revision, elsewhere.columns) == (None, None, {})


# Addresses


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/data", recursive=True)


def test_an_address_is_downloaded_once_and_again_after_a_change(memory: Any, cache_home: Path) -> None:
    memory.pipe("/data/train.jsonl", row("a").encode())
    source = Source(path="memory://data/train.jsonl")
    first = compute_source_digest(source)
    assert not list(cache_home.rglob("rows"))
    for _ in range(2):
        (document,) = (document for document, _ in read_documents(source))
        assert (document.where, document.text) == ("memory:///data/train.jsonl:1", "a")  # type: ignore[union-attr]
        assert len(list(cache_home.rglob("rows"))) == 1
    memory.pipe("/data/train.jsonl", row("b").encode())
    assert compute_source_digest(source) != first
    assert texts(source) == ["b"]


def test_a_full_disk_is_reported_during_a_download(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    memory.pipe("/data/train.jsonl", row("a").encode())
    monkeypatch.setattr(type(memory), "get_file", full)
    problem = problem_of(Source(path="memory://data/train.jsonl"))
    assert problem.message == "the launcher's cache cannot be used: No space left on device"
    assert "LAUNCHER_CACHE" in problem.remedy


def test_patterns_and_folders_at_an_address(memory: Any) -> None:
    for name, content in SPLITS.items():
        memory.pipe(f"/data/deep/{name}", content.encode())
    assert texts(Source(path="memory://data/deep/train*.jsonl")) == ["a", "b"]
    assert texts(Source(path="memory://data/deep")) == ["a", "b"]
    assert texts(Source(path="memory://data/deep", split="test")) == ["t"]
    origin = describe_origin(Source(path="memory://data/deep"))
    assert (origin["files"], origin["left_out"]) == ([f"memory:///data/deep/train-{i}.jsonl" for i in (0, 1)], ["test.jsonl"])
    assert "no split held" in problem_of(Source(path="memory://data/deep", split="held")).message
    assert "no file matches" in problem_of(Source(path="memory://data/*.csv")).message
    assert "no such data file" in problem_of(Source(path="memory://data/gone.jsonl")).message
    assert problem_of(Source(path="gopher://rows")).where == "gopher://rows"
    memory.pipe("/data/empty.jsonl", b"")
    assert problem_of(Source(path="memory://data/empty.jsonl")).message == "the data file is empty"


# Special files


@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [make_pipe, link_to_device])
def test_a_pipe_or_a_device_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "README.md"):
        make(tmp_path / "data" / name)
    for path in ("data", "data/train.jsonl", "data/*.jsonl"):
        (problem,) = check_sources(DataSection(sources=(Source(path=f"{tmp_path}/{path}"),)))
        assert problem.value == f"{tmp_path}/{path}"


class Web:
    """Serves one file under every path, with `headers`; `length` is the claimed size if it differs from the real one."""

    def __init__(self) -> None:
        self.address = ""
        self.content = ROW
        self.headers: dict[str, str] = {}
        self.length: int | None = None
        self.read: list[str] = []


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()

    def answer(request: Request) -> Answer:
        if request.method == "GET":
            web.read.append(request.path)
        length = str(web.length or len(web.content))
        return 200, web.content, {"Content-Type": "", "Content-Length": length, **web.headers}

    with serving(answer) as web.address:
        yield web


@pytest.mark.parametrize("header", ["ETag", "Last-Modified", "Content-MD5"])
def test_a_remote_file_is_downloaded_again_when_its_metadata_changes(web: Web, header: str) -> None:
    source = Source(path=f"{web.address}/a.jsonl")
    web.headers = {header: "one"}
    first = compute_source_digest(source)
    assert web.read == []
    assert texts(source) == texts(source) == ["a"]
    assert len(web.read) == 1
    web.headers, web.content = {header: "two"}, OTHER
    assert compute_source_digest(source) != first
    assert texts(source) == ["b"]


def test_a_remote_file_without_metadata_is_refused(web: Web) -> None:
    with pytest.raises(DataError) as caught:
        compute_source_digest(Source(path=f"{web.address}/a.jsonl"))
    assert caught.value.problems[0].where == f"{web.address}/a.jsonl"


def test_an_address_may_be_longer_than_a_files_name(web: Web) -> None:
    web.headers = {"ETag": "one"}
    assert texts(Source(path=f"{web.address}/a.jsonl?download=true&note={'a' * 300}")) == ["a"]


def test_an_interrupted_download_leaves_no_file(web: Web, cache_home: Path) -> None:
    web.headers, web.length = {"ETag": "one"}, 1000
    with pytest.raises(DataError):
        texts(Source(path=f"{web.address}/a.jsonl"))
    assert downloaded(cache_home) == []


def test_a_download_with_another_size_than_announced_is_refused(cache_home: Path, memory_of: Callable[..., None]) -> None:
    memory_of("/data/a.jsonl", ROW, claimed=1000)
    with pytest.raises(DataError, match="14 of 1,000 bytes"):
        texts(Source(path="memory://data/a.jsonl"))
    assert downloaded(cache_home) == []


def downloaded(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a file for which the storage claims a wrong size."""
    import fsspec

    system = fsspec.filesystem("memory")
    info = system.info

    def write(path: str, content: bytes, claimed: int) -> None:
        system.pipe(path, content)
        monkeypatch.setattr(system, "info", lambda *given, **options: {**info(*given, **options), "size": claimed})

    yield write
    system.rm("/data", recursive=True)


# Real clients in separate processes, with servers that the tests start


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
    require_exit(done)
    digest, rows, _ = json.loads(done.stdout)
    return digest, rows


@pytest.mark.rest
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


@pytest.mark.rest
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


@pytest.mark.rest
def test_offline_only_downloaded_hub_files_are_used(hub: DatasetHub, tmp_path: Path) -> None:
    environ = hub_environment(hub, tmp_path)
    hub.commit(as_bytes(SPLITS), "main")
    online = read_elsewhere(Source(path="owner/name"), environ)
    offline = {**environ, "HF_HUB_OFFLINE": "1"}
    assert read_elsewhere(Source(path="owner/name"), offline) == online
    refused, error = read_elsewhere(Source(path="owner/name", split="test"), offline)
    assert refused == "refused"
    assert "the hub cannot be reached" in error


@pytest.mark.rest
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


@pytest.mark.rest
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


@pytest.mark.rest
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
