"""Web servers that provide more or less metadata, and downloads that are cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_server import Answer, Request, serving

from launcher.config.sections.data import Source
from launcher.data.sources.reading import compute_source_digest, read_documents
from launcher.errors import DataError

ROW, OTHER = b'{"text": "a"}\n', b'{"text": "b"}\n'


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


def texts(source: Source) -> list[str]:
    return [document.text for document, _ in read_documents(source)]  # type: ignore[union-attr]


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
    assert files(cache_home) == []


def test_a_download_with_another_size_than_announced_is_refused(cache_home: Path, memory_of: Callable[..., None]) -> None:
    memory_of("/data/a.jsonl", ROW, claimed=1000)
    with pytest.raises(DataError, match="14 of 1,000 bytes"):
        texts(Source(path="memory://data/a.jsonl"))
    assert files(cache_home) == []


def files(folder: Path) -> list[Path]:
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
