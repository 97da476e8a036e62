"""Exports a checkpoint of a run on CPU: `python -m launcher.worker.export PLAN_JSON [--step N] [--dtype bf16]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.child_process import exit_on_termination
from launcher.errors import CheckpointError, LauncherError, Problem
from launcher.export import hub, weights
from launcher.export.hf_folder import ExportedFolder, describe_added_stop_ids, describe_names
from launcher.model_folders import export_run
from launcher.plan.quantities import format_count, format_size
from launcher.security.folders import private_files
from launcher.security.redaction import printable_output
from launcher.shell_commands import launcher_command
from launcher.tracking.progress import show_waiting


def _describe_export(made: ExportedFolder) -> list[str]:
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
        print("\n".join(_describe_export(made)), flush=True)
        if arguments.push:
            flags = [(name, getattr(arguments, name)) for name in ("step", "dtype", "out", "push")]
            options = [str(word) for name, value in flags if value is not None for word in (f"--{name}", value)]
            again = launcher_command("export", arguments.plan.absolute().parent, *options)
            with show_waiting(f"pushing {format_size(made.num_bytes)} to {arguments.push}"):
                address = hub.push(made.path, arguments.push, again=again)
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


if __name__ == "__main__":
    exit_on_termination()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main()
    sys.exit(code)
