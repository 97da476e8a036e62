"""Tracks which checkpoints of a run still need answers, and starts the processes and jobs that produce them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from launcher.clusters.backends import AnswerSource, answer_source, nodes_for
from launcher.errors import LauncherError, describe, printable
from launcher.evaluate.evaluation_folder import EvaluationFolder, read_exported
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir, parse_step
from launcher.runs import run_store
from launcher.shell_commands import launcher_command
from launcher.tracking.verdicts import EvaluationVerdict, digest_checkpoint, is_current, read_verdict
from launcher.worker.sidecars.sidecar import checkpoints_state, record_event

if TYPE_CHECKING:
    from launcher.clusters.backends import ClusterNodes

EVENT = "answers"
_STARTER = "launcher.child_process"
# Added to the niceness of this process. Exports keep theirs: they are short and must end before their checkpoint is removed.
_EVALUATION_NICE = 9
# Seconds from TERM to KILL. An evaluation first ends its own processes. Two such waits are shorter than the agent's.
_END_S = 8.0
# Seconds from a job that Slurm refused to the next attempt to submit it.
_SUBMIT_AGAIN_S = 600.0
_REMOVED = "its checkpoint was removed before its weights were exported; raise checkpoint.keep_last"


@dataclass(frozen=True)
class _StepWorker:
    """A process that works on one checkpoint, with its output in `log`; it ends with this process."""

    step: int
    process: subprocess.Popen[bytes]
    log: Path

    def failure(self) -> str:
        """Return why the process failed, from the last lines of its output; empty if it did not fail."""
        with suppress(OSError):
            if self.process.returncode:
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]
                return " / ".join(printable(line).strip() for line in lines) or f"exit code {self.process.returncode}"
        return ""


class CheckpointAnswers:
    """The answers for one attempt's checkpoints; call `work` every few seconds, and `conclude` at the end."""

    def __init__(self, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._run, self._plan, self._attempt = run, plan, attempt
        self._source = answer_source(plan.config, plan.topology.device)
        self._evaluation: _StepWorker | None = None
        self._export: _StepWorker | None = None
        # Steps that this attempt does not try again, with the reason, and those that have a job.
        self._failures: dict[int, str] = {}
        self._jobs: dict[int, str] = {}
        # Checkpoints up to this step belong to earlier attempts, which have reported any that were removed too early.
        self._from_step = run_store.read_attempt(run, attempt).resume_step or 0
        # The state of the checkpoint folder when the waiting steps were last listed.
        self._contents: object = None
        self._waiting: list[int] = []
        self._refused_at = -math.inf
        if self._source is AnswerSource.JOBS and attempt > 1:
            # Jobs of earlier attempts; each continues where it was cancelled.
            self._scheduler.cancel_jobs(plan)

    def work(self, is_complete: bool) -> bool:
        """Collect finished work and start what is due; returns whether training is complete and nothing is left to do."""
        self._collect_ended()
        self._list_steps()
        if self._source is AnswerSource.JOBS:
            self._submit_jobs(is_complete)
        # After training, Ray's other nodes would answer, but this one is given back.
        elif self._evaluation is None and self._source is not (
            AnswerSource.NODES if is_complete else AnswerSource.AFTER_TRAINING
        ):
            # During training, export the weights first: an evaluation spends a while on finding its questions.
            exporting = None if self._export is None else self._export.step
            ready = (one for one in self._waiting if one != exporting and (is_complete or self._is_exported(one)))
            if (step := next(ready, None)) is not None:
                if is_complete:
                    text = f"training is complete, and the run waits for the answers of step {step} ({len(self._waiting)} left)"
                    self._record_event(EVENT, f"{text}; cancel the run to end it without them", step)
                evaluate = ["-m", "launcher", "evaluate", str(self._run.root), "--step", str(step)]
                self._evaluation = self._start_process(
                    step, "evaluate", evaluate, not is_complete, 0 if is_complete else _EVALUATION_NICE
                )
        if not is_complete and self._export is None:
            # A checkpoint may be removed before its turn to be evaluated comes.
            step = next((step for step in self._waiting if not self._is_exported(step)), None)
            if step is not None:
                export = ["-m", "launcher.evaluate.weights", str(self._run.plan), str(step)]
                self._export = self._start_process(step, "export", export, True, 0)
        has_ended = self._source in (AnswerSource.JOBS, AnswerSource.NODES) or not (self._waiting or self._evaluation)
        return is_complete and has_ended

    def conclude(self, is_complete: bool) -> None:
        """End running processes, and report the steps without answers, with the commands that answer them."""
        processes = [one.process for one in (self._evaluation, self._export) if one is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
            process.wait()
        self._evaluation = self._export = self._contents = None
        if not is_complete and self._jobs and self._run.cancel(self._attempt).is_file():
            self._scheduler.cancel_jobs(self._plan)
            self._jobs = dict.fromkeys(self._jobs, "its job was cancelled")
        with suppress(OSError, LauncherError):
            self._list_steps()
        left = {**dict.fromkeys(self._waiting, ""), **self._jobs, **self._failures}
        left = {step: reason for step, reason in sorted(left.items()) if self._find_verdict(step) is None}
        if left:
            text = f"no answers yet: {', '.join(f'step {step}' + (reason and f' ({reason})') for step, reason in left.items())}"
            if any(reason != _REMOVED for reason in left.values()):
                again = "" if is_complete else "a resumed run continues with them; "
                text += f"; {again}answer them with: {launcher_command('evaluate', self._run.root, '--step', 'STEP')}"
            self._record_event("alert" if is_complete and self._failures else EVENT, text)

    @property
    def _scheduler(self) -> ClusterNodes:
        return cast("ClusterNodes", nodes_for(self._plan.config.cluster.kind))

    def _list_steps(self) -> None:
        """List the steps that are due and have no verdict, if checkpoints have come or gone or a process has ended."""
        contents, every = checkpoints_state(self._run.checkpoints), self._plan.config.eval.answers_every
        if contents == self._contents:
            return
        present = {step for name, *_ in contents if (step := parse_step(name)) is not None}
        # Exports after the newest checkpoint come from an attempt whose later steps were abandoned.
        passed = range(every, max(present, default=0) + 1, every)
        present |= {step for one in self._run.evaluations.glob("step-*/weights.json") if (step := parse_step(one.parent.name))}
        due = [
            step for step in passed if step not in self._failures.keys() | self._jobs.keys() and self._find_verdict(step) is None
        ]
        for step in due:
            if step not in present and step > self._from_step:
                self._record_failure(step, _REMOVED)
        self._waiting = [step for step in due if step in present]
        # Set this last: if storage failed, the next round lists the steps again.
        self._contents = contents

    def _find_verdict(self, step: int) -> EvaluationVerdict | None:
        with suppress(OSError, LauncherError):
            verdict = read_verdict(self._folder(step).root)
            if verdict is not None and is_current(verdict, self._run, step):
                return verdict
        return None

    def _is_exported(self, step: int) -> bool:
        with suppress(OSError, LauncherError):
            return read_exported(self._folder(step), digest_checkpoint(self._run, step)) is not None
        return False

    def _collect_ended(self) -> None:
        """Report the processes that have ended, and the verdicts of jobs."""
        if self._export is not None and self._export.process.poll() is not None:
            ended, self._export, self._contents = self._export, None, None
            if failure := ended.failure():
                self._record_failure(ended.step, f"its weights could not be exported: {failure}")
            elif not self._is_exported(ended.step):
                self._record_failure(ended.step, "another command is evaluating it")
        answered = list(self._jobs)
        if self._evaluation is not None and self._evaluation.process.poll() is not None:
            ended, self._evaluation, self._contents = self._evaluation, None, None
            answered.append(ended.step)
            if self._find_verdict(ended.step) is None:
                self._record_failure(ended.step, ended.failure() or "the evaluation has left no verdict")
        for step in answered:
            if (verdict := self._find_verdict(step)) is not None:
                self._jobs.pop(step, None)
                self._record_event(EVENT, f"answers of step {step}: {verdict.sentence}", step)

    def _record_failure(self, step: int, reason: str) -> None:
        self._failures[step] = reason
        self._record_event("alert", f"no answers of step {step}: {reason}", step)

    def _start_process(self, step: int, name: str, words: list[str], is_beside_training: bool, niceness: int) -> _StepWorker:
        """Start this Python interpreter with the arguments `words`; during training, with one thread and without GPUs."""
        # The ranks' thread settings divide a node's cores.
        environ = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
        if is_beside_training:
            environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        folder = self._folder(step).root
        # Do not create the run's own folder: the run may have been moved.
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", _STARTER, "--launcher", str(niceness), *words]
        with open(folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return _StepWorker(step, process, folder / f"{name}.log")

    def _submit_jobs(self, is_complete: bool) -> None:
        """Submit a job for each step whose weights are exported; after the end of training, for all steps."""
        if is_complete and self._export is not None:
            # The job exports the step; its checkpoint stays.
            self._export.process.kill()
            self._export.process.wait()
            self._export = None
        if not is_complete and time.monotonic() - self._refused_at < _SUBMIT_AGAIN_S:
            return
        for step in [step for step in self._waiting if is_complete or self._is_exported(step)]:
            try:
                self._jobs[step] = f"job {self._scheduler.submit_job(self._plan, self._run, step)}"
            except (OSError, LauncherError) as error:
                value = error.problems[0].value if isinstance(error, LauncherError) else ""
                reason = " ".join(f"no job could be submitted: {describe(error)} {value}".split())
                if not is_complete:
                    self._record_event(EVENT, f"no answers of step {step} yet: {reason}", step)
                    self._refused_at = time.monotonic()
                    return
                self._record_failure(step, reason)
            else:
                self._record_event(EVENT, f"the answers of step {step} come from {self._jobs[step]}", step)
            self._waiting.remove(step)

    def _folder(self, step: int) -> EvaluationFolder:
        return EvaluationFolder.of(self._run.root, step)

    def _record_event(self, kind: str, text: str, step: int | None = None) -> None:
        record_event(self._run, self._attempt, kind, text, step)
