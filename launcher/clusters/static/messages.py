"""The messages of a meeting: a machine's question to node 0, node 0's answer, and their transport."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from launcher import json_records
from launcher.errors import LauncherError

_MAX_MESSAGE_BYTES = 1 << 20
_SOCKET_S = 5.0
# The states of a start in answers.
WAITING, READY, OVER, REFUSED = "waiting", "ready", "over", "refused"


@dataclass(frozen=True)
class Question:
    """`process` distinguishes two processes that claim to be the same machine. `command` is the command's request, by keys.

    `sees` is the number found in run.root, or empty; `missed` is a number that was not found there in time.
    """

    node: int
    nodes: int
    host: str
    process: str
    run: str
    command: dict[str, str]
    sees: str = ""
    missed: str = ""


@dataclass(frozen=True)
class Answer:
    """`nonce` is this start's number. `attempt`, `own_plan` and `names` are set when the start is ready.

    `own_plan` is whether the attempt has its own plan. `message` says what the start is waiting for, or why there is nothing to
    do.
    """

    nonce: str
    host: str
    state: str = WAITING
    message: str = ""
    attempt: int = 0
    own_plan: bool = False
    names: tuple[str, ...] = ()


def ask(address: str, port: int, question: Question) -> Answer | None:
    """Return node 0's answer, or None if it does not listen or answer."""
    try:
        with socket.create_connection((address, port), timeout=_SOCKET_S) as connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(asdict(question)).encode() + b"\n")
            stream.flush()
            return json_records.loads(Answer, stream.readline(_MAX_MESSAGE_BYTES), f"{address}:{port}")
    except (OSError, LauncherError):
        return None


class MeetingServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens in a thread; answers questions and ignores anything else."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str, port: int, reply: Callable[[Question], Answer]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        class Handler(socketserver.StreamRequestHandler):
            timeout = _SOCKET_S

            def handle(self) -> None:
                with suppress(OSError, LauncherError):
                    line = self.rfile.readline(_MAX_MESSAGE_BYTES)
                    answer = reply(json_records.loads(Question, line, "a question"))
                    self.wfile.write(json.dumps(asdict(answer)).encode() + b"\n")

        super().__init__((address, port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="meeting", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing for a broken connection."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
