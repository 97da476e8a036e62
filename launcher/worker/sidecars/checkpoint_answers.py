"""Tracks which checkpoints of a run still need answers, and starts the processes and jobs that produce them, one at a time."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.clusters.answers import AnswerSource, answer_source
from launcher.clusters.backends import evaluation_nodes_for
from launcher.errors import LauncherError, RunError, UnreadableCheckpoint, describe
from launcher.evaluate.task import EvaluationFolder, read_exported
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir, evaluated_step
from launcher.shell_commands import launcher_command
from launcher.tracking.progress import EVENT as PROGRESS
from launcher.tracking.verdicts import digest_checkpoint, is_current, read_verdict
from launcher.worker.sidecars.sidecar import checkpoints_state, record_event
from launcher.worker.sidecars.step_process import StepProcess

if TYPE_CHECKING:
    from launcher.clusters.backends import EvaluationJobs

EVENT = "answers"
# Seconds between queries for jobs, and between progress reports while a run waits for answers.
_JOBS_S = 30.0
_PROGRESS_S = 15.0
# Added to the niceness of this process. Exports keep theirs: they are short and must end before their checkpoint is removed.
_EVALUATION_NICE = 9
_REMOVED = "its checkpoint was removed before its weights were exported; raise checkpoint.keep_last"
# Seconds between a refused submission and the next one.
_RETRY_S = 600.0
_RETRY_EXPORT_S = 60.0


@dataclass(frozen=True)
class AnswersJob:
    """job.json in an evaluation's folder: the job that answers the step, and the checkpoint that it was submitted for."""

    number: str
    checkpoint: str


class CheckpointAnswers:
    """The answers for one attempt's checkpoints; call `work` every few seconds, and `conclude` at the end."""

    def __init__(self, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._run, self._plan, self._attempt = run, plan, attempt
        self._every = plan.config.eval.answers_every
        self._source = answer_source(plan.config, plan.topology.device)
        self._evaluation: StepProcess | None = None
        # The evaluation that the end of the run waits for.
        self._awaited: StepProcess | None = None
        self._export: StepProcess | None = None
        self._next_export_at: dict[int, float] = {}
        # Steps that this attempt does not try again, with the reason.
        self._given_up: dict[int, str] = {}
        # Checkpoints up to this step belong to earlier attempts, which have reported any that were removed too early.
        self._from_step = run_store.read_attempt(run, attempt).resume_step or 0
        self._jobs: dict[int, str] = {}
        self._asked_at = 0.0
        self._progress_at, self._progress = time.monotonic(), ""
        # The state of the checkpoint folder when the waiting steps were last listed.
        self._contents: object = self
        self._waiting: list[int] = []
        self._refused, self._refused_at = "", 0.0
        self._is_complete = False

    def work(self, is_complete: bool) -> bool:
        """Collect finished work and start what is due; returns whether training is complete and nothing is left to do."""
        self._is_complete = is_complete
        self._collect()
        self._list_steps()
        if self._source is AnswerSource.JOBS:
            self._submit(is_complete)
            return is_complete
        if is_complete and self._source is AnswerSource.NODES:
            # Other nodes answer; this one is given back.
            return True
        if self._evaluation is None and (is_complete or self._source is not AnswerSource.AFTER_TRAINING):
            # During training, export the weights first: an evaluation spends a while on finding its questions.
            ready = (step for step in self._waiting if not self._is_worked_on(step) and (is_complete or self._is_exported(step)))
            if (step := next(ready, None)) is not None:
                self._evaluate(step, is_complete)
        if not is_complete:
            self._export_next()
        elif self._evaluation is not None:
            if self._evaluation is not self._awaited:
                self._awaited = self._evaluation
                count = f"{len(self._waiting)} left"
                waits = f"training is complete, and the run waits for the answers of step {self._awaited.step} ({count})"
                self._event(EVENT, f"{waits}; cancel the run to end it without them", self._awaited.step)
            self._report_progress(self._evaluation)
        return is_complete and not self._waiting and self._evaluation is None and self._export is None

    def conclude(self, is_complete: bool) -> None:
        """End running processes, and report the steps without answers, with the commands that answer them."""
        processes = [process for process in (self._evaluation, self._export) if process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.end()
        self._evaluation = self._export = None
        cancelled: dict[int, str] = {}
        if self._jobs and not is_complete and self._run.cancel(self._attempt).is_file():
            self._backend.cancel_jobs(list(self._jobs.values()))
            cancelled, self._jobs = dict.fromkeys(self._jobs, ""), {}
            for step in cancelled:
                with suppress(OSError):
                    self._job_file(step).unlink()
        self._contents = self
        with suppress(OSError, LauncherError):
            self._list_steps()
        self._jobs = {step: number for step, number in self._jobs.items() if not self._is_answered(step)}
        if self._jobs:
            numbers = ", ".join(f"step {step} (job {number})" for step, number in sorted(self._jobs.items()))
            self._event(EVENT, f"answers are still pending in separate jobs: {numbers}; see them with {self._status}")
        left = {**cancelled, **dict.fromkeys(self._waiting, ""), **self._given_up}
        left = {step: reason or self._refused for step, reason in left.items() if not self._is_answered(step)}
        if left:
            text = f"no answers yet: {', '.join(f'step {step}' for step in sorted(left))}"
            if reasons := list(dict.fromkeys(filter(None, left.values()))):
                text += f" ({'; '.join(reasons)})"
            usable = [step for step in sorted(left) if self._has_weights(step)]
            if commands := [launcher_command("evaluate", self._run.root, "--step", str(step)) for step in usable]:
                again = "" if is_complete else "a resumed run continues with them; "
                text += f"; {again}answer them with: {' ; '.join(commands)}"
            self._event("alert" if is_complete else EVENT, text)

    @property
    def _backend(self) -> EvaluationJobs:
        return cast("EvaluationJobs", evaluation_nodes_for(self._plan.config.cluster.kind))

    @property
    def _status(self) -> str:
        return launcher_command("status", self._run.root)

    def _list_steps(self) -> None:
        """List the steps that are due and have no verdict, if checkpoints have come or gone or a process has ended."""
        contents, root = checkpoints_state(self._run.checkpoints), self._run.checkpoints
        if contents == self._contents:
            return
        unusable = store.find_unusable(root)
        # Checkpoints that cannot be read right now are due too: their export waits for its turn, or reports why it fails.
        present = {step for step, error in unusable.items() if isinstance(error, UnreadableCheckpoint)}
        present |= {checkpoint.step for checkpoint in store.list_checkpoints(root)}
        newest = max(present, default=0)
        # Exports after the newest checkpoint come from an attempt whose later steps were abandoned.
        due = {step for step in present | self._exported_steps() if step % self._every == 0 and 0 < step <= newest}
        due = {step for step in due if not self._is_answered(step)}
        passed = range(self._every, newest + 1, self._every)
        for step in (step for step in passed if step > self._from_step and step not in due):
            if step not in self._given_up and not self._is_worked_on(step) and not self._is_answered(step):
                error = unusable.get(step)
                self._give_up(step, _REMOVED if error is None else f"its checkpoint cannot be used: {error.problems[0].message}")
        for step in due - self._given_up.keys() - self._jobs.keys():
            if (job := self._submitted_job(step)) is not None:
                self._jobs[step] = job
        self._waiting = sorted(due - self._given_up.keys() - self._jobs.keys())
        # Set this last: if storage failed, the next round lists the steps again.
        self._contents = contents

    def _exported_steps(self) -> set[int]:
        folders = (record.parent for record in self._run.evaluations.glob("step-*/weights.json"))
        return {step for folder in folders if (step := evaluated_step(folder)) is not None}

    def _is_worked_on(self, step: int) -> bool:
        return step in [process.step for process in (self._evaluation, self._export) if process is not None]

    def _is_answered(self, step: int) -> bool:
        try:
            verdict = read_verdict(self._folder(step).root)
        except (OSError, LauncherError):
            return False
        return verdict is not None and is_current(verdict, self._run, step)

    def _has_weights(self, step: int) -> bool:
        """Return whether the step can be answered: its checkpoint or its exported weights exist."""
        return os.path.isdir(self._run.checkpoints / store.step_name(step)) or self._is_exported(step)

    def _is_exported(self, step: int) -> bool:
        try:
            return read_exported(self._folder(step), digest_checkpoint(self._run, step)) is not None
        except (OSError, LauncherError):
            return False

    def _submitted_job(self, step: int) -> str | None:
        """Return the number of the unfinished job that an earlier attempt submitted for the step, or None."""
        if self._source is not AnswerSource.JOBS:
            return None
        with suppress(OSError, LauncherError):
            job = json_records.read_if_present(AnswersJob, self._job_file(step))
            if job is not None and digest_checkpoint(self._run, step) in ("", job.checkpoint):
                return None if self._backend.ended_jobs(self._plan, [job.number]) else job.number
        return None

    def _collect(self) -> None:
        """Collect the evaluation, the export and the jobs that have ended."""
        if self._export is not None and self._export.has_ended():
            step, failure, self._export = self._export.step, self._export.failure(), None
            if failure:
                self._give_up(step, f"its weights could not be exported: {failure}")
            elif not self._is_exported(step):
                # Another command is evaluating the step.
                self._next_export_at[step] = time.monotonic() + _RETRY_EXPORT_S
            self._contents = self
        if self._evaluation is not None and self._evaluation.has_ended():
            step, failure, self._evaluation = self._evaluation.step, self._evaluation.failure(), None
            self._report(step, failure)
        if self._jobs and time.monotonic() - self._asked_at > _JOBS_S:
            self._asked_at = time.monotonic()
            with suppress(RunError):
                for number, state in self._backend.ended_jobs(self._plan, list(self._jobs.values())).items():
                    step = next(step for step, job in self._jobs.items() if job == number)
                    del self._jobs[step]
                    log = self._folder(step).root / f"job-{number}.log"
                    with suppress(OSError):
                        # The job's own node wrote the verdict.
                        atomic_files.refresh_directory(self._folder(step).root)
                    self._report(step, f"job {number} is {state.lower()}; its output is {log}")

    def _report(self, step: int, failure: str) -> None:
        """Report a step's verdict, or why it has none."""
        self._contents = self
        if self._is_answered(step) and (verdict := read_verdict(self._folder(step).root)) is not None:
            self._event(EVENT, f"answers of step {step}: {verdict.sentence}", step)
        else:
            self._give_up(step, failure or "the evaluation has left no verdict")

    def _give_up(self, step: int, reason: str) -> None:
        reason = reason if self._has_weights(step) else _REMOVED
        self._given_up[step] = reason
        self._contents = self
        text = f"no answers of step {step}" if self._is_complete else f"no answers of step {step}, training continues"
        self._event("alert", f"{text}: {reason}", step)

    def _evaluate(self, step: int, is_complete: bool) -> None:
        words = ("-m", "launcher", "evaluate", str(self._run.root), "--step", str(step))
        log, niceness = self._log(step, "evaluate"), 0 if is_complete else _EVALUATION_NICE
        self._evaluation = StepProcess.start(step, words, log, is_beside_training=not is_complete, niceness=niceness)

    def _export_next(self) -> None:
        """Export the first waiting step, because its checkpoint may be removed before its turn comes."""
        if self._export is None:
            due = (step for step in self._waiting if self._next_export_at.get(step, 0.0) < time.monotonic())
            step = next((step for step in due if not self._is_worked_on(step) and not self._is_exported(step)), None)
            if step is not None:
                words = ("-m", "launcher.worker.evaluation.weights", str(self._run.plan), str(step))
                self._export = StepProcess.start(step, words, self._log(step, "export"), is_beside_training=True)

    def _submit(self, is_complete: bool) -> None:
        """Submit a job for each step whose weights are exported; after the end of training, for all steps."""
        if is_complete and self._export is not None:
            # The job exports the step; its checkpoint stays.
            self._export.end()
            self._export = None
        if not is_complete:
            self._export_next()
        if self._refused and not is_complete and time.monotonic() - self._refused_at < _RETRY_S:
            return
        for step in [step for step in self._waiting if is_complete or self._is_exported(step)]:
            try:
                number = self._backend.submit_job(self._plan, self._run, step)
            except (OSError, LauncherError) as error:
                reason = describe(error)
                if isinstance(error, LauncherError) and (value := error.problems[0].value):
                    reason += f": {' / '.join(line.strip() for line in value.splitlines())}"
                if reason != self._refused:
                    self._event("alert", f"no job for the answers of step {step} now, training continues: {reason}", step)
                self._refused, self._refused_at = reason, time.monotonic()
                return
            self._refused = ""
            with suppress(OSError):
                json_records.write(self._job_file(step), AnswersJob(number, digest_checkpoint(self._run, step)))
            self._jobs[step] = number
            self._waiting.remove(step)
            self._event(EVENT, f"the answers of step {step} come from job {number}", step)

    def _report_progress(self, process: StepProcess) -> None:
        now = time.monotonic()
        if now - self._progress_at < _PROGRESS_S or self._is_answered(process.step):
            return
        if (line := process.last_line()) and line != self._progress:
            self._progress_at, self._progress = now, line
            self._event(PROGRESS, f"answers of step {process.step}: {line}", process.step)

    def _folder(self, step: int) -> EvaluationFolder:
        return EvaluationFolder.of(self._run.root, step)

    def _job_file(self, step: int) -> Path:
        return self._folder(step).root / "job.json"

    def _log(self, step: int, name: str) -> Path:
        folder = self._folder(step).root
        # Do not create the run's own folder: the run may have been moved.
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{name}.log"

    def _event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        record_event(self._run, self._attempt, kind, text, step, **fields)
