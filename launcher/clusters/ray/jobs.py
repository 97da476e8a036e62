"""Client of Ray's Jobs API: submits the driver as a job, reads its state, stops it. Ray reads the token from the environment."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launcher
from launcher.clusters.detached_process import python_variables
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.errors import SubmitError
from launcher.security import folders

if TYPE_CHECKING:
    from launcher.config.sections.ray import RaySection

_AGENT_DEADLINE_S = 120.0
_POLL_S, _END_S = 1.0, 20.0
# How long the Jobs API may fail: a busy head node or a reconnecting tunnel comes back.
_SILENT_S = 300.0
_LAST_LINES = 20
# Ray's client has no timeout.
_REQUEST_TIMEOUT_S = 30.0
_DENIED = re.compile(r"\b40[13]\b|Unauthorized|Forbidden|authentication")


class JobUnknown(SubmitError):
    """The cluster that answers does not know the job, so it is not the one that the job was submitted to."""


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Yield a JobSubmissionClient that sends the token; its requests in this block raise SubmitError.

    Raises:
        SubmitError: if the cluster does not answer, rejects the token or a request, or does not support this client's version;
        JobUnknown if it does not have the job.
    """
    # RAY_ADDRESS would take precedence over cluster.address.
    with suppress(KeyError):
        # Do not use pop(), which is not atomic: several threads may read the states of runs.
        del os.environ["RAY_ADDRESS"]
    try:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": _REQUEST_TIMEOUT_S, **options})

        yield Client(address)
    except Exception as error:
        # Ray raises its HTTP client's exceptions, and RuntimeError for requests that the cluster rejects.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if "does not exist" in str(error):
            remedy = "use the address, or the ssh tunnel, of the cluster that the job was submitted to"
            raise JobUnknown("the cluster has no such job", where="cluster.address", value=address, remedy=remedy) from None
        denied = _DENIED.search(str(error)) is not None
        remedy = "check cluster.address, and that the head node and its dashboard are running"
        if denied:
            remedy = "set the cluster's token in the environment: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        raise SubmitError(
            "the cluster rejected the token" if denied else "the cluster's Jobs API does not answer",
            where="cluster.address",
            value=f"{address}: {lines[0][:300] if lines else type(error).__name__}",
            remedy=remedy,
        ) from None


def submit(
    section: RaySection, code: Path, name: str, module: str, arguments: Sequence[str], environ: Mapping[str, str] | None = None
) -> str:
    """Submit `PYTHON -m MODULE ARGUMENTS` with `code` on its path, as a job of the run `name`; returns the job's id.

    Every user of the head node can see the arguments, and everyone with the token `environ`, in which Ray replaces `${NAME}`.
    """
    import tenacity

    # The Jobs API accepts only a shell string; every word in it is quoted.
    entrypoint = shlex.join([section.python, "-m", module, *arguments])
    # Everyone with the token can read these.
    variables = {**python_variables(code, {}), "PYTHONUNBUFFERED": "1", **(environ or {})}
    # The driver checks the run again, possibly as another user, and accepts the same owners as this command.
    variables[folders.TRUST_VARIABLE] = f"{folders.Trust.from_environ(os.environ).as_numbers()},${{{folders.TRUST_VARIABLE}}}"
    # A newly started head node answers a few seconds before it accepts jobs.
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, RuntimeError) and "No available agent" in str(error)),
        stop=tenacity.stop_after_delay(_AGENT_DEADLINE_S),
        wait=tenacity.wait_fixed(1),
        reraise=True,
    )
    with connect(section.address or "") as client:
        job: str = retrying(
            client.submit_job,
            entrypoint=entrypoint,
            runtime_env={"env_vars": variables},
            metadata={"run": name},
            entrypoint_num_cpus=0,
        )
    return job


def run_driver(
    section: RaySection,
    name: str,
    module: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    deadline: float,
    show: Callable[[str], None],
) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` here, or as a job on the cluster, and end it at the deadline, a time.monotonic() time.

    `show` gets the lines of its output as they arrive; the last lines and messages are returned.
    """
    code = Path(launcher.__file__).resolve().parents[1]
    if not section.is_http:
        of_driver = {**os.environ, **python_variables(code, os.environ), **environ}
        with NodeCommand([sys.executable, "-u", "-m", module, *arguments], "", of_driver) as driver:
            lines = driver.show_lines(show, deadline)
            return [*lines, *(line.strip() for line in driver.errors if line.strip())]
    address = section.address or ""
    job = submit(section, code, f"launcher-{name}-{secrets.token_hex(4)}", module, arguments, environ)
    num_shown, answered_at, log, message = 0, time.monotonic(), "", ""
    try:
        while time.monotonic() < deadline:
            try:
                with connect(address) as client:
                    info, log = client.get_job_info(job), client.get_job_logs(job)
            except JobUnknown:
                raise
            except SubmitError:
                if time.monotonic() - answered_at > _SILENT_S:
                    raise
            else:
                answered_at, message, has_ended = time.monotonic(), info.message or "", info.status.is_terminal()
                # A line that is still being written does not end in a newline.
                lines = [line for line in log.splitlines(keepends=True) if has_ended or line.endswith("\n")]
                for line in lines[num_shown:]:
                    show(line)
                num_shown = len(lines)
                if has_ended:
                    break
            time.sleep(_POLL_S)
        return [*log.splitlines()[-_LAST_LINES:], message]
    finally:
        with uninterrupted(), suppress(SubmitError), connect(address) as client:
            client.stop_job(job)
            until = time.monotonic() + _END_S
            while time.monotonic() < until and not client.get_job_status(job).is_terminal():
                time.sleep(_POLL_S)
            client.delete_job(job)
