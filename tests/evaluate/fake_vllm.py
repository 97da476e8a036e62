"""A fake of vLLM's HTTP server, copied in place of vLLM's server module. It answers each prompt with its length."""

from __future__ import annotations

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    requests: Path

    def do_GET(self) -> None:
        self._send(200, {})

    def do_POST(self) -> None:
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._send(401, {})
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.requests.open("a") as file:
            file.write(json.dumps(body) + "\n")
        choices = [
            {"index": i, "text": f" {len(ids)} tokens", "token_ids": [7, 8, 2], "finish_reason": "stop" if i else "length"}
            for i, ids in enumerate(body["prompt"])
        ]
        # Return the choices in another order than the prompts.
        self._send(200, {"choices": choices[::-1]})

    def _send(self, code: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--host", "--dtype", "--served-model-name", "--generation-config"):
        parser.add_argument(flag, required=True)
    for flag in ("--port", "--max-model-len", "--tensor-parallel-size"):
        parser.add_argument(flag, type=int, required=True)
    arguments = parser.parse_args()
    if arguments.generation_config != "vllm":
        raise SystemExit("the settings of the model's folder would change answers")
    if not Path(arguments.model).is_dir():
        raise SystemExit(f"no such model: {arguments.model}")
    Handler.requests = Path(arguments.model) / "requests.jsonl"
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
