"""A fake Hugging Face Hub on a local port that supports uploads: real HTTP, files kept in memory.

The endpoints are those of huggingface_hub 2: api/repos/create, preupload, tree, LFS batch and transfer, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from http_server import Answer, Request, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` are the repository's files, once it `exists`; `refuse` maps the end of a path to the status of the answer."""

    token: str
    address: str = ""
    private: bool | None = None
    exists: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def answer(self, request: Request) -> tuple[int, Any]:
        method, path, body = request.method, request.path, request.body
        for end, status in self.refuse.items():
            if path.endswith(end):
                return status, {"error": "refused by the test"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if not self.exists:
                self.private = asked.get("private", asked.get("visibility") == "private")
            self.exists = True
            return 200, {"url": f"{self.address}/owner/name", "name": "owner/name", "id": "owner/name"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/owner/name/preupload/main":
            modes = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            answers = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False, "oid": None}
                for f in files
            ]
            return 200, {"files": answers}
        if path.startswith("/api/models/owner/name/tree/main"):
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.files.items()]
            return 200, tree
        if path == "/owner/name.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": upload}
        if method == "PUT" and path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path == "/api/models/owner/name/commit/main":
            self._commit([json.loads(line) for line in body.splitlines() if line])
            return 200, {"commitUrl": f"{self.address}/owner/name/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            if not self.exists:
                return 404, {"error": "Repository not found"}
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {
                "id": "owner/name",
                "modelId": "owner/name",
                "sha": COMMIT,
                "private": self.private,
                "siblings": siblings,
            }
        self.unknown.append(f"{method} {path}")
        return 404, {"error": f"the fake hub has no {method} {path}"}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]


@contextmanager
def running_hub(token: str) -> Iterator[FakeHub]:
    """A Hub that knows one user, by `token`, and answers 401 to everyone else."""
    hub = FakeHub(token)

    def answer(request: Request) -> Answer:
        is_known = request.headers.get("Authorization") == f"Bearer {hub.token}" or request.path.startswith("/lfs/")
        status, content = hub.answer(request) if is_known else (401, {"error": "Invalid credentials"})
        return status, content, {"X-Error-Code": "RepoNotFound"} if status == 404 and not hub.exists else {}

    with serving(answer) as hub.address:
        yield hub
