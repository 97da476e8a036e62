"""The pages' links, numbers and pictures are right, and the site is built from them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hand_made
import pytest
from doc_tools import PAGES, README, REPO, anchors, links, name_of
from forked import require_exit
from missing_program import skip_or_fail

import launcher
from launcher.plan.run_dir import RunDir

# The rows of the tables that say where to make a change: the change, the files to edit with the names in them, the tests.
CHANGES = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for table in (REPO / "docs/extending.md").read_text(encoding="utf-8").split("| to change or add | edit | tests |")[1:]
    for line in table.split("\n\n")[0].splitlines()[2:]
]
SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "make_pictures.py"


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


def defined_names(path: Path) -> set[str]:
    """Return what a module defines at its top level, and the members of its classes as CLASS.MEMBER."""
    names: set[str] = set()
    bodies = [("", ast.parse(path.read_text(encoding="utf-8")).body)]
    for prefix, body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                bodies.append((f"{node.name}.", node.body))
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names |= {prefix + name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize(("change", "edit", "tests"), CHANGES, ids=[row[0] for row in CHANGES])
def test_each_file_that_a_change_edits_defines_what_the_row_names(change: str, edit: str, tests: str) -> None:
    for names, path in re.findall(r"((?:`[\w.]+`, )*`[\w.]+`) (?:in|of) `([\w/]+\.py)`", edit):
        assert set(re.findall(r"[\w.]+", names)) <= defined_names(REPO / path), f"{path} does not define all of {names}"
    spans = [span for cell in (edit, tests) for span in re.findall(r"`([^`]+)`", cell)]
    paths = [span for span in spans if "/" in span or span.endswith((".toml", ".txt"))]
    assert [path for path in paths if not (REPO / path).exists()] == []
    assert paths
    assert re.search(r"`tests/", tests)


def test_the_tables_of_changes_are_read() -> None:
    assert len(CHANGES) >= 30
    assert {len(row) for row in CHANGES} == {3}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_path_of_somebodys_machine(page: Path) -> None:
    assert not re.search(r"/(?:work|root|tmp)/[a-z]+/", page.read_text(encoding="utf-8"))


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (Path(launcher.__file__).parent / "py.typed").is_file()


def test_the_license_is_the_one_that_the_package_declares() -> None:
    assert (REPO / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert 'license = "Apache-2.0"' in (REPO / "pyproject.toml").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    """Load a module from docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, REPO / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_packages_is_what_the_contracts_say() -> None:
    assert load("packages_picture").main(["--check"]) == 0


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        skip_or_fail("the site is built with: pip install 'launcher[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, env=environment)
    require_exit(done)
    index = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "quickstart.html" in index
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis.com" not in text
        assert "<p>|" not in text, f"{page.name}: the rows of a table have lost its head"


@pytest.mark.parametrize(
    ("source", "site_path", "link", "rewritten"),
    [
        ("README.md", "index.md", "docs/data.md#findings", "data.md#findings"),
        ("README.md", "index.md", "benchmarks/RESULTS.md", "benchmarks/RESULTS.md"),
        ("docs/performance.md", "performance.md", "../benchmarks/RESULTS.md#saving", "benchmarks/RESULTS.md#saving"),
        ("slurm/README.md", "slurm/README.md", "../docs/slurm.md", "../slurm.md"),
        ("docs/slurm.md", "slurm.md", "https://example.com/docs/a.md", "https://example.com/docs/a.md"),
    ],
)
def test_links_fit_the_layout_of_the_site(source: str, site_path: str, link: str, rewritten: str) -> None:
    pytest.importorskip("mkdocs")
    assert load("site_hooks").rewrite_links(f"see [this]({link}).", source, site_path) == f"see [this]({rewritten})."


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module docs/make_pictures.py, set to write to the test's folder."""
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "runs/demo", state="completed", attempt=1, step=40, max_steps=40)


def test_the_status_picture_shows_the_run_and_no_path_of_this_machine(pictures: ModuleType, run: RunDir) -> None:
    svg = pictures.draw_status(run.root).read_text()
    assert "40&#160;of&#160;40" in svg
    assert str(run.root) not in svg
    assert "demo&#160;in&#160;runs/demo" in svg


def test_every_number_in_the_readmes_bullets_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", text.split("## What it does", 1)[1].split("\n## ", 1)[0], re.MULTILINE)
    assert len(bullets) == 6
    measured = numbers_in((REPO / "benchmarks/RESULTS.md").read_text(encoding="utf-8"))
    for bullet in bullets:
        numbers = numbers_in(re.sub(r"\]\([^)]*\)|`[^`]*`|ZeRO-3", "", bullet))
        assert numbers, f"no measured number: {bullet}"
        assert numbers <= measured, bullet
        assert "benchmarks/RESULTS.md" in bullet


def test_every_measurement_of_the_performance_guide_is_in_the_results() -> None:
    table = (REPO / "docs/performance.md").read_text(encoding="utf-8").split("## Measurements", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "RESULTS.md#" in line]
    measured = numbers_in((REPO / "benchmarks/RESULTS.md").read_text(encoding="utf-8"))
    assert len(rows) >= 10
    for _, own, other, _ in rows:
        assert numbers_in(own), own
        assert numbers_in(re.sub(r"\([^)]*\)", "", f"{own} {other}")) <= measured, (own, other)


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d(?:[\d,.]*\d)?", text))
