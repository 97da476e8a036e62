"""A fake Hugging Face Hub on a local port that supports reading a dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from http_server import Answer, Request, serving


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
