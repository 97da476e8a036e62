from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_tools import PAGES, REPO, anchors, links, name_of

import launcher


@pytest.mark.parametrize("page", [*PAGES, REPO / "docs/settings.md"], ids=name_of)
def test_every_relative_link_and_anchor_exists(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:launcher|tests|conf|docs|benchmarks|slurm|docker)/[\w./-]*)`", text))
    examples = {"conf/cluster/queue.yaml", "docs/config.md"}
    assert {path for path in paths - examples if not (REPO / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_path_of_somebodys_machine(page: Path) -> None:
    assert not re.search(r"/(?:work|root|tmp)/[a-z]+/", page.read_text(encoding="utf-8"))


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (Path(launcher.__file__).parent / "py.typed").is_file()


def test_the_license_is_the_one_that_the_package_declares() -> None:
    assert (REPO / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert 'license = "Apache-2.0"' in (REPO / "pyproject.toml").read_text(encoding="utf-8")
