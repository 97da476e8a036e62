"""A malicious HF_ENDPOINT server answers with names that point outside the Hub cache, and with endless content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_owners import MALLORY, as_root, give
from http_server import serving
from huggingface_hub import constants, get_token
from huggingface_hub.utils import _auth, _http

from launcher.errors import DataError
from launcher.security import hub_answers
from launcher.security.hub_answers import leads_outside

__all__ = ["as_root"]

Launch = Callable[..., subprocess.CompletedProcess[str]]

COMMIT = "1" * 40
FILE = b'{"text": "a row"}\n'
# Points next to the cache folder: blobs and snapshots are two levels below it.
OUTSIDE = "../../../outside"

_CODE = """
import json, sys
from launcher.config.sections.data import Source
from launcher.data.sources import locate
from launcher.security import hub_answers

hub_answers._MAX_JSON_BYTES = 1 << 20
hub_answers.guard_hub_client()
from huggingface_hub import get_session, snapshot_download

address, *names = sys.argv[1:]
outcomes = {"waits": [*get_session().get(f"{address}/busy").headers.keys() & {"retry-after", "ratelimit"}]}
for name in names:
    try:
        outcomes[name] = snapshot_download(f"owner/{name}")
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
try:
    outcomes["rows"] = [file.name for file in locate.fetch_files(Source(path="owner/rows"))]
except Exception as error:
    outcomes["rows"] = f"{type(error).__name__}: {error}"
print(json.dumps(outcomes))
"""


class HostileHub(BaseHTTPRequestHandler):
    """Each repository is named after its attack; `plain` and `weak` are harmless."""

    outside: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = {*self.headers_of(), "sha", "absolute-sha", "tree", "endless", "rows", "moved", "pages"}
        name = next((part for part in path.split("/") if part in names), "")
        if path == "/busy":
            return self._send(200, b"{}", {"Retry-After": "1000000000", "RateLimit": '"api";r=0;t=1000000000'})
        if "/resolve/" in path:
            return self._send(200, FILE, {"ETag": '"abc"', "X-Repo-Commit": COMMIT, **self.headers_of().get(name, {})})
        if name == "endless":
            return self._send_without_end()
        if name == "moved" and path.startswith("/api/") and "/tree/" not in path:
            return self._send(307, b"", {"Location": "/elsewhere/moved"})
        if "/tree/" in path or path == "/elsewhere/pages":
            is_first = name == "pages" and "/tree/" in path
            oid = f"{OUTSIDE}/oid" if name in ("tree", "pages") and not is_first else "2" * 40
            listing = [{"type": "file", "path": "config.json", "size": len(FILE), "oid": oid}]
            next_page = {"Link": f'<http://{self.headers["Host"]}/elsewhere/pages>; rel="next"'}
            return self._send(200, json.dumps(listing).encode(), next_page if is_first else {})
        sha = {"absolute-sha": f"{self.outside}/sha", "sha": f"{OUTSIDE}/sha", "moved": f"{OUTSIDE}/sha"}.get(name, COMMIT)
        siblings = [{"rfilename": "train.jsonl" if "/datasets/" in path else "config.json"}]
        return self._send(200, json.dumps({"id": f"owner/{name}", "sha": sha, "siblings": siblings}).encode(), {})

    do_HEAD = do_GET

    def headers_of(self) -> dict[str, dict[str, str]]:
        return {
            "plain": {},
            "weak": {"ETag": 'W/"abc/def"'},
            "etag": {"ETag": f'"{OUTSIDE}/etag.pth"'},
            "absolute": {"X-Linked-ETag": f'"{self.outside}/linked.pth"'},
            "commit": {"X-Repo-Commit": f"{OUTSIDE}/commit"},
            "absolute-commit": {"X-Repo-Commit": f"{self.outside}/commit"},
            "rows": {"ETag": f'"{OUTSIDE}/rows.pth"'},
        }

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_without_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"[" * 65536)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    with serving(type("Hub", (HostileHub,), {"outside": tmp_path / "outside"})) as address:
        yield address


def environ(address: str, folder: Path) -> dict[str, str]:
    home = {"HF_HOME": str(folder / "hf"), "HF_HUB_CACHE": str(folder / "cache"), "LAUNCHER_CACHE": str(folder / "launcher")}
    return {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", **home}


def test_no_answer_of_a_server_leads_out_of_the_cache(hub: str, tmp_path: Path) -> None:
    attacks = ("etag", "absolute", "commit", "absolute-commit", "sha", "absolute-sha", "tree", "endless", "moved", "pages")
    command = [sys.executable, "-P", "-c", _CODE, hub, "plain", "weak", *attacks]
    done = subprocess.run(
        command, env={**os.environ, **environ(hub, tmp_path)}, capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for name in ("plain", "weak"):
        assert (Path(outcomes[name]) / "config.json").read_bytes() == FILE, outcomes[name]
    for name in (*attacks, "rows"):
        assert outcomes[name].startswith("DataError: the answer of the Hub is rejected: "), (name, outcomes[name])
        assert "remedy: set HF_ENDPOINT to a server that you trust" in outcomes[name]
    assert "takes more than 1 MiB" in outcomes["endless"]
    assert outcomes["waits"] == [], "the client would wait for years"
    assert not (tmp_path / "outside").exists()


def test_a_command_says_which_server_it_does_not_believe(hub: str, tmp_path: Path, launch_here: Launch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(FILE * 3)
    done = launch_here("data", "model.path=owner/etag", f"data.path={rows}", **environ(hub, tmp_path))
    assert done.returncode == 2, done.stderr
    assert "the answer of the Hub is rejected: its header ETag names a file outside the cache" in done.stderr
    assert not (tmp_path / "outside").exists()


def test_a_server_cannot_name_a_folder_as_storage() -> None:
    """Xet's client would make folders there."""
    request = SimpleNamespace(url=SimpleNamespace(scheme="http", host="hub", path="/"))

    def answer(address: str) -> SimpleNamespace:
        return SimpleNamespace(headers={"X-Xet-Cas-Url": address}, request=request, has_redirect_location=False)

    for address in ("local:///home/mine", "memory://", "/home/mine"):
        with pytest.raises(DataError, match="its header X-Xet-Cas-Url names storage that is not a server"):
            hub_answers._check(answer(address))
    hub_answers._check(answer("https://cas.hub"))


def test_an_answer_that_cannot_be_checked_is_rejected() -> None:
    """The client could still read it: its own calls are less deep when it does."""
    request = SimpleNamespace(url=SimpleNamespace(scheme="http", host="hub", path="/"))
    with pytest.raises(DataError, match="it is nested too deeply"):
        hub_answers._check_content(SimpleNamespace(iter_bytes=lambda: iter([b"[" * 100_000]), request=request))


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", 'W/"../x"', '"a/../../x"', '"/etc/x"', "a\\..\\x"])
def test_names_that_lead_out_of_a_folder(name: str) -> None:
    assert leads_outside(name)


@pytest.mark.parametrize("name", ["", COMMIT, '"5f3-abc:1"', 'W/"a+b/c=="', '"a..b"', "v1.0"])
def test_names_of_storage(name: str) -> None:
    assert not leads_outside(name)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o755])
def test_no_token_is_written_where_others_could_put_a_link(monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    """The client renews the token of a login that is about to expire, and writes all logins through links, with the names that
    the file had before: in a shared HF_HOME, another user's login became this user's `.bash_profile`."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http._GLOBAL_CLIENT_FACTORY)
    monkeypatch.setattr(_auth, "_OAUTH_REFRESH_CACHE", None)
    monkeypatch.setenv("HF_XET_CACHE", "")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        token, logins, own = Path(name, "hub/token"), Path(name, "hub/stored_tokens"), Path(name, "own")
        token.parent.mkdir()
        token.write_text("hf_old")
        logins.write_text("[$(code)]\nhf_token = hf_old\nrefresh_token = r\nexpires_at = 1\n")
        own.touch()
        Path(name).chmod(0o755)
        token.parent.chmod(mode)
        if mode != 0o755:
            for file in (token, logins):
                give(file, MALLORY)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(logins))

        def renew(_: str) -> dict[str, str]:
            logins.unlink()
            logins.symlink_to(own)
            return {"access_token": "hf_new"}

        monkeypatch.setattr(_auth, "refresh_access_token", renew)
        hub_answers.guard_hub_client.__wrapped__()
        assert get_token() == ("hf_new" if mode == 0o755 else "hf_old")
        assert own.read_text().startswith("[$(code)]") is (mode == 0o755), "the client does not do that any more"
