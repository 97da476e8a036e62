"""A W&B server on a local port, and W&B's files, read with its own reader."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_server import Answer, Request, serving
from wandb.util import get_core_path

KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY = "team"
HISTORY, SUMMARY, EVENTS = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl"


@dataclass
class Run:
    """The server's data for a run; `exits` are the exit codes of its attempts."""

    name: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    preempting: bool = False

    def rows(self, file: str = HISTORY) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get(file, {}).items())]

    @property
    def steps(self) -> list[int]:
        """The step of every history line, in the order of the lines."""
        return [row["_step"] for row in self.rows()]

    @property
    def summary(self) -> dict[str, Any]:
        return next(reversed(self.rows(SUMMARY)), {})


@dataclass
class FakeWandb:
    """`fault`: None works, "error" answers 500 to everything, "hang" accepts and never answers, "refuse" answers 401.

    After `close()` nothing listens. `projects` are those of ENTITY.
    """

    fault: str | None = None
    stopped: bool = False
    address: str = ""
    projects: tuple[str, ...] = ()
    runs: dict[str, Run] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    alerted_at: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    freed: threading.Event = field(default_factory=threading.Event)
    close: Callable[[], None] = lambda: None

    def run(self, name: str = "abcd1234") -> Run:
        return self.runs[name]

    def answer(self, request: Request) -> Answer:
        path, body = request.path, request.body
        kind, _, code = request.headers.get("Authorization", "").partition(" ")
        key = base64.b64decode(code).decode().removeprefix("api:") if kind == "Basic" else None
        self.received.append(f"{path} {body.decode(errors='replace')}")
        while self.fault == "hang" and not self.freed.is_set():
            time.sleep(0.05)
        if self.fault == "error":
            return 500, {"error": "refused by the test"}
        if path.startswith("/upload/"):
            return 200, {}
        if key != KEY or self.fault == "refuse":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if path == "/graphql":
            asked = json.loads(body)
            return self._graphql(asked["query"], asked.get("variables") or {})
        found = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        if found is None:
            self.unknown.append(f"{request.method} {path}")
            return 404, {"error": "the fake server has nothing here"}
        return self._stream(self.runs[found[3]], json.loads(body))

    def _stream(self, run: Run, sent: dict[str, Any]) -> tuple[int, Any]:
        for name, chunk in sent.get("files", {}).items():
            lines = run.lines.setdefault(name, {})
            # The summary is a single line that each update replaces.
            offset = 0 if name == SUMMARY else chunk["offset"]
            assert offset <= len(lines), f"a gap in {name}: line {offset} after {len(lines)} lines"
            lines.update(enumerate(chunk["content"], offset))
        run.preempting = run.preempting or bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exits.append(sent["exitcode"])
        return 200, {"exitcode": sent.get("exitcode"), "limits": {}, "stopped": self.stopped}

    def _graphql(self, query: str, asked: dict[str, Any]) -> tuple[int, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else query
        if operation not in _OPERATIONS:
            self.unknown.append(f"{operation}: {query}")
            return 400, {"errors": [{"message": f"the fake server has no {operation}"}]}
        entity = asked.get("entity") or asked.get("entityName")
        if operation == "UpsertBucket" and entity not in (None, ENTITY):
            return 404, {"errors": [{"message": f"entity {entity} not found during upsertBucket"}]}
        return 200, {"data": _OPERATIONS[operation](self, asked)}

    def _viewer(self, asked: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {
            "id": "u",
            "entity": ENTITY,
            "username": "me",
            "email": "me@x.org",
            "flags": "{}",
            "admin": False,
            "teams": teams,
        }
        return {"viewer": viewer}

    def _features(self, asked: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _model(self, asked: dict[str, Any]) -> Any:
        """A project that does not exist is null for everyone who may write to its entity."""
        project, entity = asked.get("project") or asked.get("name"), asked.get("entity") or ENTITY
        if entity != ENTITY or project not in self.projects:
            return None
        return {"id": project, "name": project, "entity": {"id": entity, "name": entity}}

    def _resume_status(self, asked: dict[str, Any]) -> Any:
        run = self.runs.get(asked["name"])
        if run is None or run.project != asked["project"]:
            return {"model": self._model(asked)}
        started = {"t": run.config["_wandb"]["value"]["t"]} if "_wandb" in run.config else {}
        bucket = {
            "id": run.name,
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.about["displayName"],
            "logLineCount": 0,
            "historyLineCount": len(run.lines.get(HISTORY, {})),
            "eventsLineCount": len(run.lines.get(EVENTS, {})),
            "historyTail": json.dumps([json.dumps(row) for row in run.rows()[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.rows(EVENTS)[-1:]]),
            "config": json.dumps(run.config),
            "tags": run.about.get("tags"),
            "notes": None,
            "wandbConfig": json.dumps(started),
        }
        return {"model": {**self._model(asked), "bucket": bucket}}

    def _upsert(self, asked: dict[str, Any]) -> Any:
        inserted = asked["name"] not in self.runs
        self.projects += () if asked["project"] in self.projects else (asked["project"],)
        run = self.runs.setdefault(asked["name"], Run(asked["name"], asked["project"]))
        run.about |= {key: value for key, value in asked.items() if value is not None}
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        project = {"id": run.project, "name": run.project, "entity": {"id": ENTITY, "name": ENTITY}}
        known = {"displayName": run.about["displayName"], "description": None, "config": json.dumps(run.config)}
        counts = {"sweepName": None, "project": project, "historyLineCount": len(run.lines.get(HISTORY, {}))}
        return {"upsertBucket": {"bucket": {"id": run.name, "name": run.name, **known, **counts}, "inserted": inserted}}

    def _alert(self, asked: dict[str, Any]) -> Any:
        """An alert is dropped if one with the same title was sent within waitDuration (milliseconds)."""
        now = time.monotonic()
        if now - self.alerted_at.get(asked["title"], -math.inf) >= asked["waitDuration"] / 1000:
            self.alerted_at[asked["title"]] = now
            self.alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _run_files(self, asked: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.address}/upload/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _stop_status(self, asked: dict[str, Any]) -> Any:
        return {"project": {"run": {"stopped": self.stopped}}}

    def _organization(self, asked: dict[str, Any]) -> Any:
        return {"entity": None}


_OPERATIONS = {
    "Viewer": FakeWandb._viewer,
    "ServerFeaturesQuery": FakeWandb._features,
    "RunResumeStatus": FakeWandb._resume_status,
    "UpsertBucket": FakeWandb._upsert,
    "NotifyScriptableRunAlert": FakeWandb._alert,
    "CreateRunFiles": FakeWandb._run_files,
    "RunStoppedStatus": FakeWandb._stop_status,
    "OrganizationCoreWeaveOrganizationID": FakeWandb._organization,
}


@contextmanager
def fake_wandb(**settings: Any) -> Iterator[FakeWandb]:
    """A server that has answered or dropped all requests at the end of the block."""
    server = FakeWandb(**settings)
    with ExitStack() as port:
        server.address = port.enter_context(serving(server.answer))
        server.close = port.close
        try:
            yield server
        finally:
            server.freed.set()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of all offline files of a run, oldest file first."""
    lines = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        # The command that `wandb leet inspect` runs after it has imported W&B's package.
        command = [
            get_core_path(),
            "leet",
            "inspect",
            "--no-observability",
            "--json",
            "--run-file",
            str(file),
            str(file.parent.parent),
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        lines += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return lines


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The logged values, one dict for each of W&B's steps."""
    return [record["history"]["item"] for record in records(run_dir) if record["type"] == "history"]
