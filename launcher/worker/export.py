"""Exports a checkpoint of a run on CPU: `python -m launcher.worker.export PLAN_JSON [--step N] [--dtype bf16]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import run_store
from launcher.checkpoint import store
from launcher.errors import CheckpointError, LauncherError, Problem
from launcher.export import hub, model_card, weights
from launcher.export.hf_folder import (
    ExportedFolder,
    ExportTask,
    describe_added_stop_ids,
    describe_names,
    export,
    find_chat_template,
    verify_checkpoint,
)
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count, format_size
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.security.printable_stream import printable_output
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.progress import show_progress, show_waiting
from launcher.worker.signals import exit_on_termination


def export_run(plan_path: Path, *, step: int | None, dtype: str, out: Path | None, check: bool = True) -> ExportedFolder:
    """Verify and export one checkpoint of a run: by default the latest one, to the run's `export` folder.

    Raises CheckpointError if there is no such checkpoint or it is damaged, and as `export` does.
    """
    # Use plan.json's folder, because the run may have been moved.
    run = RunDir(plan_path.absolute().parent)
    first = _load(plan_path)
    checkpoint = store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, step)
    # A resume may have changed settings; later automatic attempts keep the changes.
    plans = run_store.load_plans_until(run, checkpoint.manifest.attempt)
    plan = plans[-1] if plans else first
    base = Path(plan.model.path or "")
    task = ExportTask(
        checkpoint=checkpoint.path,
        # Files in the cache may have been removed since.
        model=base if plan.model.path and (base / "config.json").is_file() else plan.model.config,
        tokenizer=_tokenizer_of(plan),
        out=(out or run.export).absolute(),
        dtype=dtype,
        trust_remote_code=plan.config.model.trust_remote_code,
        code_digest=plan.config.model.code_digest,
        check=check,
        chat_template=find_chat_template(plan),
        turn_end_ids=plan.data.turn_end_ids if plan.data else (),
    )
    metrics = read_metrics(run.metrics, model_card.METRICS)
    with show_progress() as make_progress:
        verify_checkpoint(task, make_progress)
        return export(
            task, lambda made: model_card.render_model_card(plan, checkpoint.manifest, metrics, made, plans), make_progress
        )


def _tokenizer_of(plan: LaunchPlan) -> Path | None:
    folder = plan.model.tokenizer_path
    if folder is None or Path(folder).is_dir():
        return None if folder is None else Path(folder)
    # Imports transformers, which an export without a check does not need.
    from launcher.worker.prepare import tokenizer_of

    return tokenizer_of(plan)


def _load(plan_path: Path) -> LaunchPlan:
    try:
        return LaunchPlan.load(plan_path)
    except ValueError as error:
        raise CheckpointError("this launch plan cannot be read", where=str(plan_path), value=str(error)) from error


def _lines(made: ExportedFolder) -> list[str]:
    """Return lines that describe an export to the user."""
    size = f"{format_size(made.num_bytes)} in {format_count(len(made.files), 'file')}"
    lines = [f"exported step {made.step} to {made.path}", f"  {made.num_parameters:,} parameters in {made.dtype}, {size}"]
    if made.added_stop_ids:
        lines.append(f"  {describe_added_stop_ids(made)}")
    if names := describe_names(made):
        lines.append(f"  {names}")
    if made.num_compared:
        lines.append(f"  digests: all {made.num_compared} tensors equal the engine's")
    else:
        lines.append("  digests: not compared; this checkpoint has no digests of the engine's weights")
    if not made.loaded:
        lines.append(f"  not loaded by transformers: {made.not_loaded}")
    elif (parity := made.parity) is None:
        lines.append("  loaded by transformers, logits finite; this checkpoint has no reference logits to compare them with")
    else:
        lines.append(
            f"  loaded by transformers; logits over {parity.num_tokens} tokens: mean KL {parity.mean_kl:.2e} nats "
            f"(at most {parity.max_mean_kl:g}), same top token {parity.top1_agreement:.1%}, "
            f"largest difference {parity.max_abs_diff:.3g}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.worker.export", description="Export a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("plan", type=Path, metavar="PLAN_JSON", help="the run's plan.json")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--dtype", choices=sorted(weights.DTYPES), default="bf16", help="type of the written weights")
    parser.add_argument("--out", type=Path, help="folder to write (default: export/ in the run directory)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hub that gets the folder")
    parser.add_argument("--no-check", action="store_true", help="do not load the folder with transformers")
    arguments = parser.parse_args(argv)
    # Libraries' progress bars and warnings would break up the plain lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with private_files():
            made = export_run(
                arguments.plan, step=arguments.step, dtype=arguments.dtype, out=arguments.out, check=not arguments.no_check
            )
        print("\n".join(_lines(made)), flush=True)
        if arguments.push:
            with show_waiting(f"pushing {format_size(made.num_bytes)} to {arguments.push}"):
                address = hub.push(made.path, arguments.push, again=_again(arguments))
            print(f"  pushed to {address}")
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # The error of a copy names the source first, but only the target can run out of space.
        failed = Problem(
            "the export could not be read or written",
            where=str(error.filename2 or error.filename or ""),
            value=error.strerror or str(error),
            remedy="check the space and the permissions of this disk, or name a folder on another disk with --out",
        )
        print(failed, file=sys.stderr)
        return CheckpointError.exit_code
    return 0


def _again(arguments: argparse.Namespace) -> str:
    """Return the command that repeats an export and its push."""
    flags = [(name, getattr(arguments, name)) for name in ("step", "dtype", "out", "push")]
    options = [str(word) for name, value in flags if value is not None for word in (f"--{name}", value)]
    return launcher_command("export", arguments.plan.absolute().parent, *options)


if __name__ == "__main__":
    exit_on_termination()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main()
    sys.exit(code)
