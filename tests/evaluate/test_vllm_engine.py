"""The vLLM engine with a fake HTTP server in place of vLLM: prompts, answers, shutdown and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.errors import RunError
from launcher.evaluate import vllm_engine
from launcher.evaluate.evaluation_folder import Weights
from launcher.evaluate.vllm_engine import VllmEngine

FAKE = Path(__file__).with_name("fake_vllm.py")
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter in whose environment vLLM's server module is the fake server."""
    packages = tmp_path / "packages"
    module = packages / "vllm/entrypoints/openai"
    module.mkdir(parents=True)
    for folder in (packages / "vllm", packages / "vllm/entrypoints", module):
        (folder / "__init__.py").touch()
    (module / "api_server.py").write_text(FAKE.read_text())
    (packages / "vllm-0.11.0.dist-info").mkdir()
    (packages / "vllm-0.11.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.11.0\n")
    file = tmp_path / "python"
    note = f'echo "$PYTHONPATH$PYTHONSAFEPATH" > {tmp_path}/inherited'
    file.write_text(f'#!/bin/sh\n{note}\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    file.chmod(0o700)
    return file


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    (tmp_path / "model").mkdir()
    return Weights(str(tmp_path / "model"), "digest", (2,))


def engine_of(python: Path, weights: Weights) -> VllmEngine:
    return VllmEngine(python, weights, dtype="bf16", context=128)


def servers(weights: Weights) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"--model", weights.folder} <= {*(process.info["cmdline"] or ())}
    ]


def await_no_server(weights: Weights) -> None:
    until = time.monotonic() + 60
    while servers(weights):
        assert time.monotonic() < until, "the server is still there"
        time.sleep(0.1)


def test_prompts_go_as_token_ids_and_answers_come_in_their_order(
    python: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    engine = engine_of(python, weights)
    try:
        (server,) = servers(weights)
        assert {connection.laddr.ip for connection in server.net_connections() if connection.status == "LISTEN"} == {"127.0.0.1"}
        assert os.environ.get("VLLM_API_KEY") is None
        inherited = python.with_name("inherited").read_text().strip()
        assert inherited == "", "packages of this program are not those of vLLM's environment"
        assert server.environ()["HF_HUB_OFFLINE"] == "1", "its client of the Hub is not guarded"
        assert server.cwd() == "/", "Python imports modules from the working directory"
        answers = engine.generate([[5, 6], [5, 6, 7]], stop_strings=["\n\n"], max_new_tokens=9)
    finally:
        engine.close()
    assert [(one.text, one.num_tokens, one.is_stopped) for one in answers] == [(" 2 tokens", 2, False), (" 3 tokens", 2, True)]
    (request,) = map(json.loads, (Path(weights.folder) / "requests.jsonl").read_text().splitlines())
    assert request["prompt"] == [[5, 6], [5, 6, 7]]
    assert (request["temperature"], request["repetition_penalty"], request["max_tokens"]) == (0, 1, 9)
    assert (request["stop"], request["stop_token_ids"]) == (["\n\n"], [2])
    await_no_server(weights)


@pytest.mark.rest
def test_the_version_is_that_of_the_environment(python: Path) -> None:
    assert vllm_engine.read_version(python) == "0.11.0"
    assert vllm_engine.read_version(Path(sys.executable)) is None
    assert vllm_engine.read_version(python.with_name("missing")) is None


def test_a_server_that_ends_is_an_error_with_its_last_words(python: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        engine_of(python, Weights(str(tmp_path / "absent"), "", (2,)))
    (problem,) = caught.value.problems
    assert problem.message == "vLLM ended with exit code 1 before it answered"
    assert f"no such model: {tmp_path / 'absent'}" in problem.value
    assert "evaluate.vllm_python" in problem.remedy


def test_the_server_ends_with_a_process_that_is_killed(python: Path, weights: Weights) -> None:
    code = (
        "import sys, time; from pathlib import Path; from launcher.evaluate.evaluation_folder import Weights\n"
        "from launcher.evaluate.vllm_engine import VllmEngine\n"
        f"VllmEngine(Path({str(python)!r}), Weights({weights.folder!r}, '', (2,)), dtype='bf16', context=128)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert servers(weights)
        process.send_signal(signal.SIGKILL)
    await_no_server(weights)


def test_a_server_that_ends_later_gets_no_further_prompt(python: Path, weights: Weights) -> None:
    engine = engine_of(python, weights)
    try:
        (server,) = servers(weights)
        server.kill()
        await_no_server(weights)
        with pytest.raises(RunError, match="vLLM gave no answer"):
            engine.generate([[5, 6]], stop_strings=[], max_new_tokens=9)
    finally:
        engine.close()
