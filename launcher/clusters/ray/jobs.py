"""Ray's Jobs API: the driver as a job of the cluster. The token comes from the environment, as Ray's own tools read it."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.clusters.detached_process import with_code
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir

if TYPE_CHECKING:
    from launcher.config.ray import RaySection

T = TypeVar("T")

_AGENT_S = 120.0
# Ray's client itself waits for an answer for ever.
_REQUEST_S = 30.0
_DENIED = re.compile(r"\b40[13]\b|Unauthorized|Forbidden|authentication")


def require_answer(address: str) -> None:
    """Ask the cluster for its version.

    Raises:
        SubmitError: where it does not answer, does not take the token, or is too old.
    """
    _client(address)


class JobUnknown(SubmitError):
    """The cluster that answers has no such job: it is another one than that which took it."""


def submit(section: RaySection, run: RunDir, module: str, arguments: Sequence[str]) -> str:
    """Submit `PYTHON -m MODULE ARGUMENTS`, run from the run's code; returns the job's id.

    Raises:
        SubmitError: with Ray's words.
    """
    # The only shell string here is made of quoted words, since the Jobs API takes nothing else.
    address = section.address or ""
    entrypoint = shlex.join([section.python, "-m", module, *arguments])
    # What stands here anyone with the token can read: only what was named for it, and no key.
    passed = {name: os.environ[name] for name in section.pass_env if name in os.environ}
    variables = {**passed, "PYTHONPATH": with_code(run.code, {}), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    client = _client(address)

    def hand_over() -> str:
        until = time.monotonic() + _AGENT_S
        while True:
            try:
                job: str = client.submit_job(
                    entrypoint=entrypoint,
                    runtime_env={"env_vars": variables},
                    metadata={"run": run.root.name},
                    entrypoint_num_cpus=0,
                )
                return job
            except RuntimeError as error:
                # A head that has just been started takes jobs some seconds after it answers.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(1)

    return _in_words(address, hand_over)


def state(address: str, job: str) -> tuple[str, str]:
    """Ray's word for the state of a job (PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED), and its message.

    Raises:
        SubmitError: where the cluster does not answer.
    """
    client = _client(address)
    info = _in_words(address, lambda: client.get_job_info(job))
    return str(info.status.value), info.message or ""


def stop(address: str, job: str) -> None:
    """Kill a job's driver, and with it its workers."""
    client = _client(address)
    _in_words(address, lambda: client.stop_job(job))


def _client(address: str) -> Any:
    def connect() -> Any:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": _REQUEST_S, **options})

        return Client(address)

    # Where a variable names another cluster, the address of the settings counts.
    with suppress(KeyError):
        # Not pop(): it looks first, and another thread may ask for another run.
        del os.environ["RAY_ADDRESS"]
    return _in_words(address, connect)


def _in_words(address: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except Exception as error:
        # Ray raises whatever its HTTP client does, and RuntimeError for what the cluster refuses.
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        if "does not exist" in str(error):
            remedy = "let the address, or the tunnel behind it, lead to the cluster that took the job"
            raise JobUnknown("the cluster knows no such job", where="cluster.address", value=address, remedy=remedy) from None
        denied = _DENIED.search(str(error)) is not None
        remedy = "check cluster.address and that the head node and its dashboard run"
        if denied:
            remedy = "give the cluster's token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE in the environment"
        raise SubmitError(
            "the cluster does not take the token" if denied else "the cluster's Jobs API does not answer as it should",
            where="cluster.address",
            value=f"{address}: {said[0][:300] if said else type(error).__name__}",
            remedy=remedy,
        ) from None
