"""The sides of a comparison, all prepared from one plan and run as user commands."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import results
from steps import summarize

from launcher.config.sections.data import DataSection
from launcher.data.sources.reading import read_documents
from launcher.data.split import Split
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.jsonl import read_metrics

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
RUN_TIMEOUT_S = 1200.0
# The source of the launcher's figures, for `record`.
FROM_TRAIN = "From `python -m launcher train` (its metrics.jsonl)."
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "trl", "liger-kernel", "flash-attn", "wandb")


@dataclass(frozen=True)
class Prepared:
    """The inputs of all sides, made from one plan: `overrides` for the launcher, files for the others."""

    folder: Path
    overrides: tuple[str, ...]
    plan: LaunchPlan
    steps: int
    warmup: int
    timeout_s: float = RUN_TIMEOUT_S

    @property
    def rows(self) -> Path:
        return self.folder / "rows.npz"

    @property
    def chats(self) -> Path:
        return self.folder / "chats.jsonl"

    @property
    def deepspeed(self) -> Path:
        return self.folder / f"deepspeed-{self.plan.batch.micro_batch_size}.json"

    def with_micro_batch(self, size: int) -> Prepared:
        """Return a copy with another micro-batch for all sides."""
        return self if size == self.plan.batch.micro_batch_size else self.with_overrides(f"train.micro_batch_size={size}")

    def with_overrides(self, *words: str) -> Prepared:
        """Return a copy with additional launcher overrides, which must not change the data."""
        overrides = (*self.overrides, *words)
        command = [sys.executable, "-m", "launcher", "plan", "--json", *overrides]
        changed = replace(self, overrides=overrides, plan=read_plan(run(command, self.folder / "plan.log")))
        changed.deepspeed.write_text(json.dumps(changed.plan.deepspeed))
        return changed


def prepare(folder: Path, overrides: list[str], steps: int, warmup: int, timeout_s: float = RUN_TIMEOUT_S) -> Prepared:
    """Build the model folder and data cache, and write the same rows and documents for the other sides."""
    settings = (*overrides, f"train.max_steps={steps}", "train.epochs=null")
    command = [sys.executable, "-m", "launcher"]
    run([*command, "data", *settings], folder / "data.log", timeout_s=timeout_s)
    plan = read_plan(run([*command, "plan", "--json", *settings], folder / "plan.log"))
    if plan.data is None:
        raise SystemExit(f"launcher data has not built the cache:\n{(folder / 'data.log').read_text()}")
    if plan.model.path is None:
        raise SystemExit(f"the model {plan.config.model.name} has no weights for the other sides to load; use model=demo")
    prepared = Prepared(folder, settings, plan, steps, warmup)
    prepared.deepspeed.write_text(json.dumps(plan.deepspeed))
    _write_rows(plan, steps, prepared.rows)
    _write_chats(plan.config.data, prepared.chats)
    return prepared


def read_plan(output: str) -> LaunchPlan:
    """Return the plan from the output of `launcher plan --json`, which has additional keys."""
    values = json.loads(output)
    return LaunchPlan.model_validate({key: value for key, value in values.items() if key in LaunchPlan.model_fields})


def launcher_side(prepared: Prepared, extra: tuple[str, ...] = (), without_last_save: bool = False) -> dict[str, Any]:
    """Run `python -m launcher train`, measured from its metrics.jsonl; `without_last_save` ends it after the last step."""
    root = Path(tempfile.mkdtemp(dir=prepared.folder))
    started = time.time()
    metrics = root / "bench" / "metrics.jsonl"
    run(
        [sys.executable, "-m", "launcher", "train", *prepared.overrides, f"run.root={root}", "run.name=bench", *extra],
        root / "log",
        one_thread_environment(),
        timeout_s=prepared.timeout_s,
        is_done=(lambda: len(_step_lines(metrics)) >= prepared.steps) if without_last_save else None,
    )
    lines = _step_lines(metrics)
    total = [0, *(int(line["trainer/tokens"]) for line in lines)]
    events = [json.loads(line) for line in (root / "bench" / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(root)
    began = lines[0]["time"] - lines[0]["time/step_s"]
    figures = summarize(started, began, [line["time"] for line in lines], np.diff(total).tolist(), prepared.warmup)
    alerts = [event["text"] for event in events if event["kind"] == "alert"]
    return {**figures, "metrics": lines[prepared.warmup :], "alerts": alerts, "messages": [event["text"] for event in events]}


def _step_lines(metrics: Path) -> list[dict[str, Any]]:
    """Return the lines of steps; lines without tokens belong to checkpoints and evaluations."""
    return [line for line in read_metrics(metrics) if "trainer/tokens" in line] if metrics.is_file() else []


def bare_side(prepared: Prepared, *options: str) -> dict[str, Any]:
    """Run benchmarks/bare_loop.py on the rows of the launcher's plan, in its order; return its figures, and `saves`."""
    return _torchrun(prepared, "bare_loop.py", "--rows", str(prepared.rows), *options)


def trl_side(prepared: Prepared, recompute: bool, *options: str) -> dict[str, Any]:
    """Run benchmarks/trl_sft.py on the documents of the plan's sources."""
    length = str(prepared.plan.config.data.max_length)
    flags = ["--recompute"] if recompute else []
    return _torchrun(prepared, "trl_sft.py", "--data", str(prepared.chats), "--max-length", length, *flags, *options)


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def ray_side(prepared: Prepared) -> dict[str, Any]:
    """Run benchmarks/ray_trainer.py: the bare loop in a TorchTrainer."""
    rows = ("--rows", str(prepared.rows))
    return _measured(prepared, [sys.executable], "ray_trainer.py", f"--workers={prepared.plan.topology.world_size}", *rows)


def _torchrun(prepared: Prepared, script: str, *options: str) -> dict[str, Any]:
    world_size = prepared.plan.topology.world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return _measured(prepared, command, script, *options)


def _measured(prepared: Prepared, start: list[str], script: str, *options: str) -> dict[str, Any]:
    plan = prepared.plan
    command = [
        *start,
        str(HERE / script),
        f"--model={plan.model.path}",
        f"--deepspeed={prepared.deepspeed}",
        *options,
    ]
    command += [f"--steps={prepared.steps}", f"--warmup={prepared.warmup}", f"--lr={plan.config.optim.lr}"]
    started = time.time()
    output = run(command, prepared.folder / f"{script}.log", timeout_s=prepared.timeout_s)
    # Libraries print to standard output too.
    measured = json.loads(next(line for line in output.splitlines() if line.startswith('{"began"')))
    figures = summarize(started, measured["began"], measured["times"], measured["tokens"], prepared.warmup)
    return {**figures, "saves": measured.get("saves", []), "peak_gib": measured.get("peak_gib")}


@dataclass(frozen=True)
class Cost:
    """The cost of a command, including all processes that it started; see process_tree.py."""

    seconds: float
    cpu_s: float
    peak_mib: float
    largest_mib: float


def measure(command: list[str], log: Path, environment: dict[str, str]) -> tuple[Cost, str]:
    """Run a command as a user would; return its cost and its standard output. Standard error goes to `log`.

    Raises:
        SystemExit: if it fails or takes longer than RUN_TIMEOUT_S.
    """
    figures = log.with_suffix(".figures.json")
    output = run([sys.executable, str(HERE / "process_tree.py"), str(figures), *command], log, environment)
    return Cost(**json.loads(figures.read_text())), output


def user_environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a command that has run before: Python finds its bytecode, in `folder`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode"), **variables}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def one_thread_environment() -> dict[str, str]:
    """Return the environment of ranks that share this machine's cores; Python writes its bytecode, as it does for users."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def run(
    command: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    timeout_s: float = RUN_TIMEOUT_S,
    is_done: Callable[[], bool] | None = None,
) -> str:
    """Run to the end and return standard output; standard error goes to `log`. The default environment has one thread per rank.

    If `is_done` returns True, the command is killed and counts as successful.

    Raises:
        SystemExit: if it fails or takes longer than `timeout_s`; all its processes are ended.
    """
    variables = {**(environment or one_thread_environment())}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), variables.get("PYTHONPATH"))))
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, cwd=HERE.parent)
        ends_at = time.monotonic() + timeout_s
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=min(0.5, timeout_s) if is_done else timeout_s)
                    break
                if is_done is not None and is_done():
                    _kill(process)
                    return ""
                if time.monotonic() >= ends_at:
                    _kill(process)
                    raise SystemExit(f"{' '.join(command)}\nran longer than {timeout_s:.0f} s:\n{log.read_text()[-4000:]}")
        except BaseException:
            _kill(process)
            raise
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{output[-2000:]}\n{log.read_text()[-4000:]}")
    return output


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all its descendants, and wait, because they hold GPU memory until they are gone."""
    with suppress(psutil.NoSuchProcess):
        started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(started, timeout=30)


def _write_rows(plan: LaunchPlan, steps: int, file: Path) -> None:
    """Write the rows of the first `steps` global batches in the launcher's order, for the bare loop."""
    # Imported here because it imports torch, which most benchmarks do not need.
    from launcher.data.loader import TrainBatches

    assert plan.data is not None
    split, batch = Split.open(plan.data), plan.batch
    # One rank and one micro-batch give whole global batches, in order.
    whole = batch.model_copy(update={"micro_batch_size": batch.global_batch_size, "accumulation": 1})
    order = TrainBatches(split, whole, plan.config.run.seed, data_rank=0, data_ranks=1, pad_id=0)
    rows = np.concatenate([np.array(order.step(step).row_ids) for step in range(steps)])
    lengths = split.row_lengths(rows)
    shape = (len(rows), int(lengths.max()))
    input_ids, position_ids, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens = slice(split.rows[row], split.rows[row + 1])
        input_ids[i, :length] = split.tokens[tokens]
        labels[i, :length] = np.where(split.trained[tokens], input_ids[i, :length], -100)
        for start, end in itertools.pairwise([*split.doc_offsets(row), shape[1]]):
            position_ids[i, start:end] = np.arange(end - start)
    np.savez(file, input_ids=input_ids, position_ids=position_ids, labels=labels, lengths=lengths)


def _write_chats(data: DataSection, file: Path) -> None:
    """Write the training documents in the format that TRL reads."""
    with open(file, "w", encoding="utf-8") as out:
        for source in data.sources:
            for document, held_out in read_documents(source):
                if document.messages and not held_out:
                    turns = [{"role": message.role, "content": message.content} for message in document.messages]
                    out.write(json.dumps({"prompt": turns[:-1], "completion": turns[-1:]}) + "\n")


def hardware() -> str:
    """Return the machine in one line: processor or GPU, cores, memory."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = cpu.group(1) if cpu else platform.processor()
    return f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def machine() -> str:
    """Return the machine and the versions of the relevant packages, as a sentence."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.replace("-", "_"))]
    packages = []
    for name in installed:
        # A folder with the package's name may exist without the package.
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return f"{hardware()}. Python {platform.python_version()}, {', '.join(packages)}."


def parser(doc: str | None, rounds: int | None, rounds_help: str = "runs of each side") -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; without `--rounds` if that is None."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=_positive, default=rounds, help=f"{rounds_help} (default: {rounds})")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="file of the results (default: benchmarks/RESULTS.md)"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def typed(script: str, *arguments: object) -> str:
    """Return a benchmark's command line as shown in the results."""
    return f"`python benchmarks/{' '.join(map(str, (script, *arguments)))}`"


def record(file: Path, key: str, title: str, source: str, command: str, table: list[str]) -> None:
    """Print the table and write it into `file` as the current section of the benchmark `key`.

    `source` names the source of the launcher's figures: a command, or function calls.
    """
    body = "\n".join([source, "", machine(), "", *table, "", command])
    dated = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {title}"
    print(f"{key}: {dated}\n\n{body}")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    file.write_text(results.with_section(text, key, dated, body), encoding="utf-8")
