"""Answers from vLLM in its own environment: its server listens on loopback and ends with this process."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import httpx

from launcher.clusters.network import LOOPBACK, free_port
from launcher.errors import RunError
from launcher.evaluate.evaluation_folder import Weights
from launcher.evaluate.metrics import GeneratedAnswer

# Starts the server in such a way that it ends with this process.
_STARTER = "launcher.child_process"
_SERVER = "vllm.entrypoints.openai.api_server"
_HOST = LOOPBACK.address
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_START_S, _REQUEST_S, _END_S, _POLL_S = 1800.0, 3600.0, 20.0, 0.5
_LOG_LINES = 6
_PYTHON_S = 60.0


class VllmEngine:
    """vLLM's OpenAI server for one model; prompts are token ids, so that they equal those of the other engine."""

    def __init__(self, python: Path, weights: Weights, *, dtype: str, context: int, num_gpus: int = 1) -> None:
        """Start the server and wait until it answers."""
        self._weights, self._python = weights, python
        key, port = secrets.token_hex(16), free_port(_HOST)
        # A proxy from the environment cannot reach loopback.
        self._client = httpx.Client(
            base_url=f"http://{_HOST}:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=_REQUEST_S, trust_env=False
        )
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        model = str(Path(weights.folder).absolute())
        command = [str(python.absolute()), "-m", _SERVER, "--model", model, "--served-model-name", "model"]
        command += ["--host", _HOST, "--port", str(port), "--dtype", _DTYPES[dtype], "--max-model-len", str(context)]
        # Otherwise, sampling settings in the model's folder, such as repetition_penalty, would change the answers.
        command += ["--tensor-parallel-size", str(num_gpus), "--generation-config", "vllm"]
        # Other users of this machine can see arguments and reach the port.
        environ = {**os.environ, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _STARTER, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            until, is_ready = time.monotonic() + _START_S, False
            while not is_ready:
                if self._process.poll() is not None:
                    raise self._make_error(f"vLLM ended with exit code {self._process.returncode} before it answered")
                if time.monotonic() > until:
                    raise self._make_error(f"vLLM did not answer within {_START_S:.0f} s")
                with suppress(httpx.TransportError):
                    is_ready = self._client.get("/health", timeout=_POLL_S * 10).is_success
                time.sleep(0 if is_ready else _POLL_S)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], *, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedAnswer]:
        """Return an answer for each prompt."""
        request = {
            "model": "model",
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(stop_strings),
            "stop_token_ids": list(self._weights.stop_ids),
            "return_token_ids": True,
        }
        try:
            response = self._client.post("/v1/completions", json=request)
            if response.is_error:
                raise self._make_error(f"vLLM refused the prompts: {response.text[:500]}")
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        except (httpx.TransportError, ValueError) as error:
            raise self._make_error(f"vLLM gave no answer: {error}") from None
        if len(choices) != len(prompts):
            raise self._make_error(f"vLLM gave {len(choices)} answers to {len(prompts)} prompts")
        answers = []
        for choice in choices:
            num_tokens = sum(token not in self._weights.stop_ids for token in choice["token_ids"])
            answers.append(GeneratedAnswer(str(choice["text"]), choice["finish_reason"] == "stop", num_tokens))
        return answers

    def close(self) -> None:
        """End the server and all processes that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
                break
        # Processes that the server did not end itself.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._client.close()
        self._log.close()

    def _make_error(self, message: str) -> RunError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
        remedy = "check the environment of evaluate.vllm_python; without the setting, transformers generates the answers"
        return RunError(message, where=str(self._python), value=" / ".join(line.strip() for line in lines), remedy=remedy)


def read_version(python: Path) -> str | None:
    """Return the version of vLLM in the environment of an interpreter; None if there is none."""
    if not os.access(python, os.X_OK) or not python.is_file():
        return None
    code = "from importlib.metadata import version; print(version('vllm'))"
    # The server runs without this program's module search path.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, env=environ, timeout=_PYTHON_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
