from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from doc_tools import REPO
from missing_program import skip_or_fail


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
    assert done.returncode == 0, done.stdout + done.stderr
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
