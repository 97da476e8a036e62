"""mkdocs hooks that add README.md as the first page, and Markdown files outside docs/ as pages at their own paths.

On GitHub a guide links such a file as `../benchmarks/RESULTS.md`, and README.md links a guide as `docs/data.md`. The pages keep
the repository's layout, with docs/ as the root, so that only these prefixes need rewriting.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Site path -> path in the repository.
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "slurm/README.md": "slurm/README.md",
    "docker/README.md": "docker/README.md",
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/."""
    for site_path, repository_path in PAGES.items():
        files.append(File.generated(config, site_path, abs_src_path=str(ROOT / repository_path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite a page's relative links from the repository's layout to the site's."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewrite_links(markdown, source, page.file.src_uri)


def rewrite_links(markdown: str, source: str, site_path: str) -> str:
    """Rewrite relative links in `markdown`, which is at `source` in the repository and at `site_path` on the site."""
    site_paths = {repository_path: path for path, repository_path in PAGES.items()}

    def rewrite(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = site_paths.get(repository_path, repository_path.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(path, posixpath.dirname(site_path) or '.')}{match[3]}"

    return _LINK.sub(rewrite, markdown)
