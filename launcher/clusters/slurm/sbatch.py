"""A run's batch script, rendered by submitit: it opens the attempt, starts one task per node, and concludes the attempt."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.clusters.node_command import blocked_signals
from launcher.clusters.slurm.submitit_task import NodeTask
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection, asks_for_gpus
from launcher.errors import SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.folders import TRUST_VARIABLE, Trust
from launcher.shell_commands import launcher_command, shell_command

# Paths that sbatch and srun accept unchanged when quoted: no %, which sbatch replaces, and no quotes.
_PLAIN_PATH = re.compile(r"/[\w.@+/= -]*")
# In container mount lists, a comma or a colon ends a path; for enroot, a space does too.
_MOUNTED_PATH = re.compile(r"/[\w.@+/=-]*", re.ASCII)
# Runs the rest of the line with these signals ignored until the agent handles them: Slurm sends USR2 to the task whatever it
# executes, and would kill a starting Python. A node without access to the plan reports this at once.
_SIGNAL_SHIELD = 'sh -c \'trap "" USR1 USR2; [ -r "$0" ] || { echo "$(uname -n) cannot read $0" >&2; exit 78; }; exec "$@"\' '
# Options of a run's job that do not belong to other jobs for it.
_OF_RUNS = frozenset({"array", "begin", "deadline", "dependency", "mail-type", "mail-user", "mail_type", "mail_user"})


def render(plan: LaunchPlan, plan_path: Path) -> str:
    """Render the batch script.

    Raises:
        SubmitError: for a path that a batch script cannot contain.
    """
    # submitit's public functions render a script only while they submit it.
    from submitit.slurm.slurm import _make_sbatch_string

    run = RunDir(Path(plan.run_dir))
    folder = run.jobs / "%j"
    command = f"{python_command(plan, plan_path)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(plan, plan_path)) + "\n"


def submit(plan: LaunchPlan, plan_path: Path) -> str:
    """Submit the job and return its id. The pickle that submitit writes contains only the plan's path.

    Raises:
        SubmitError: with sbatch's message, or how to look for the job if sbatch ended without an answer.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    run = RunDir(Path(plan.run_dir))
    run.jobs.mkdir(mode=0o700, exist_ok=True)
    executor = submitit.SlurmExecutor(folder=run.jobs / "%j", python=python_command(plan, plan_path))
    executor.update_parameters(**parameters(plan, plan_path))
    try:
        # The terminal sends Ctrl-C to sbatch too; if it killed sbatch, a job whose number nobody knows might remain.
        with clean_environment(), blocked_signals(signal.SIGINT):
            job = executor.submit(NodeTask(str(plan_path)))
    except (FailedJobError, FailedSubmissionError) as error:
        cause = error.__cause__
        # A signal ended sbatch, or sbatch printed nothing.
        if (isinstance(cause, subprocess.CalledProcessError) and cause.returncode < 0) or not str(error).strip():
            # Slurm may have the job; it could not run, because its task is stored after sbatch answers.
            look = shell_command("squeue", "--me", f"--name={plan.run_name}")
            start_again = launcher_command("resume", plan.run_dir)
            remedy = f"look for it with: {look}, end it with scancel, then start the run with: {start_again}"
            raise SubmitError("sbatch ended without an answer; Slurm may have the job", where="sbatch", remedy=remedy) from None
        # The error is submitit's report of a failed command.
        lines = [line.strip() for line in str(error).splitlines()]
        message = "\n".join([line for line in lines if line.startswith("sbatch:")] or lines)
        raise SubmitError("sbatch refused the job", where="sbatch", value=message) from None
    return str(job.job_id)


@contextmanager
def clean_environment() -> Iterator[None]:
    """Remove variables that would override the script (SBATCH_*) or that describe another job (SLURM_*)."""
    original = dict(os.environ)
    for name in original:
        if name.startswith(("SBATCH_", "SLURM_", "SLURMD_", "SUBMITIT_", "LAUNCHER_ATTEMPT")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(original)


def parameters(plan: LaunchPlan, plan_path: Path) -> dict[str, Any]:
    """Return submitit's parameters for the plan."""
    section = SlurmSection.of(plan.config.cluster)
    additional = {
        "time": section.time,
        "chdir": plain_path(plan.run_dir),
        "requeue" if section.requeue else "no-requeue": True,
        **{name: value or True for name, value in section.additional_parameters.items()},
    }
    # With -c and -m, Python would import from the current folder first, but the submitted snapshot must run.
    environment = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **section.env}
    code = shlex.quote(plain_path(str(RunDir(Path(plan.run_dir)).code)))
    setup = [
        "umask 077",
        "# The tasks act on these signals; this shell survives them, and concludes the job at the end.",
        "trap : TERM USR1 USR2",
        *setup_commands(section),
        "# The lines below check exit codes themselves; cluster.setup may have turned on `set -e`.",
        "set +e",
        *(
            [f"export {TRUST_VARIABLE}={shlex.quote(Trust.from_environ(os.environ).as_numbers())}"]
            if TRUST_VARIABLE in os.environ
            else []
        ),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"LAUNCHER_ATTEMPT=$({_job_command('begin', plan_path)}) || exit",
        "# Nothing is left to do, or another job does it.",
        '[ -n "$LAUNCHER_ATTEMPT" ] || exit 0',
        "export LAUNCHER_ATTEMPT",
    ]
    return {
        "job_name": plan.run_name,
        **requested_nodes(section, plan.topology.nodes, plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0),
        "signal_delay_s": section.signal_lead_seconds,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": additional,
        "setup": setup,
        "teardown": ["rc=$?", f'{_job_command("conclude", plan_path)} "$LAUNCHER_ATTEMPT" "$rc"', "exit"],
        "srun_args": ["--kill-on-bad-exit=1", *task_arguments(section, ("LAUNCHER_ATTEMPT",), needed_folders(plan))],
    }


def requested_nodes(section: SlurmSection, nodes: int, gpus: int) -> dict[str, Any]:
    """Return the request to Slurm; None leaves a value to the site. `gpus` per node applies if the settings name none."""
    if section.gpus_per_node is not None:
        gpus = section.gpus_per_node
    elif asks_for_gpus(section.additional_parameters.get("gres")):
        gpus = 0
    return {
        "nodes": nodes,
        "ntasks_per_node": 1,
        "account": section.account,
        "partition": section.partition,
        "gpus_per_node": gpus or None,
        "cpus_per_task": section.cpus_per_task,
        # Request all memory of an exclusive node; otherwise the site's default per CPU would be the limit.
        "mem": "0" if section.exclusive else None,
        "exclusive": True if section.exclusive else None,
    }


def request_words(config: RunConfig, name: str, num_gpus: int, minutes: int) -> list[str]:
    """Return the arguments of salloc or sbatch for the job's name and its request."""
    section = SlurmSection.of(config.cluster)
    requested = requested_nodes(section, section.nodes, num_gpus)
    additional = {key: value or True for key, value in section.additional_parameters.items() if key not in _OF_RUNS}
    options = {"job-name": name, "time": str(minutes), **requested, **additional}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in options.items()
        if value is not None
    ]


def python_command(plan: LaunchPlan, plan_path: Path) -> str:
    """Return the shell words that start Python in a task, in its container if there is one."""
    section = SlurmSection.of(plan.config.cluster)
    command = python_words(section, plan.topology.device == "cuda", needed_folders(plan))
    return _SIGNAL_SHIELD + shlex.join([plain_path(str(plan_path)), *command])


def python_words(section: SlurmSection, has_gpus: bool, folders: Sequence[str]) -> list[str]:
    """Return the command that starts Python in a task, in its container if there is one, where `folders` are mounted."""
    if section.container_image and section.container_runtime == "apptainer":
        gpu = ["--nv"] if has_gpus else []
        binds = [word for mount in _list_mounts(folders, section) for word in ("--bind", mount)]
        return ["apptainer", "exec", *gpu, *binds, section.container_image, section.container_python]
    return [section.container_python if section.container_image else plain_path(sys.executable)]


def setup_commands(section: SlurmSection) -> list[str]:
    """Return the script lines that run the settings' commands."""
    return [shlex.join(words) for words in map(str.split, section.setup)]


def _job_command(verb: str, plan_path: Path) -> str:
    return shlex.join([plain_path(sys.executable), "-m", "launcher.worker.slurm.job", verb, plain_path(str(plan_path))])


def task_arguments(section: SlurmSection, variables: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return srun's arguments for one task per node, with the container, its mounted `folders` and its variables."""
    # No CPU binding: one task starts all ranks of its node, and they share the job's CPUs there.
    arguments = ["--export=ALL", "--cpu-bind=none"]
    if section.container_image and section.container_runtime == "pyxis":
        mounts = ",".join(_list_mounts(folders, section))
        # Without this, variables that the image sets would take precedence.
        environment = f"--container-env={','.join(('PYTHONPATH', 'PYTHONSAFEPATH', *variables))}"
        arguments += [f"--container-image={section.container_image}", environment, f"--container-mounts={mounts}"]
    return [*arguments, *section.srun_args]


def needed_folders(plan: LaunchPlan) -> list[str]:
    """Return the folders that ranks read and write."""
    folders = [plan.run_dir, *plan.cache_dirs, plan.model.path, plan.model.tokenizer_path]
    return [folder for folder in folders if folder is not None]


def _list_mounts(folders: Sequence[str], section: SlurmSection) -> list[str]:
    """Return the mounts: `folders` under the same paths, and those in cluster.container_mounts."""
    # A snapshot in the Hub's cache contains links to files next to it.
    roots = (path.parents[1] if path.parent.name == "snapshots" else path for path in map(Path, folders))
    paths = dict.fromkeys(map(str, roots))
    for path in paths:
        if not _MOUNTED_PATH.fullmatch(path):
            raise SubmitError(
                "a container cannot mount this path",
                where="the batch script",
                value=path,
                remedy="use an absolute path of ASCII letters, digits and . _ @ + = - / only",
            )
    return [*(f"{path}:{path}" for path in paths), *section.container_mounts]


def plain_path(path: str) -> str:
    if not _PLAIN_PATH.fullmatch(path):
        raise SubmitError(
            "a batch script cannot contain this path",
            where="the batch script",
            value=path,
            remedy="use an absolute path of letters, digits, blanks and . _ @ + = - / only",
        )
    return path
