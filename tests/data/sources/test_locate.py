"""Sources given as folders, patterns and addresses."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from file_owners import as_root
from source_folders import CARD, SPLITS, SUBSETS, Files, row

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.reading import check_sources, compute_source_digest, describe_origin, make_eval_source, read_documents
from launcher.errors import DataError, Problem

__all__ = ["as_root"]


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
