"""Test the launcher on this machine's GPU: its GPU tests, each attention kernel alone, speed and memory against the plan.

    python benchmarks/gpu.py [full] [--cpu-rehearsal]

Needs one GPU, at most 10 minutes and no network; weights are random. The launcher, TRL with Liger, and a bare DeepSpeed loop
train a model of 1.7 billion parameters on packed rows of 4,096 tokens. The launcher then repeats this with compiled layers, which
are off by default. `full` adds models of 0.6 and 3 billion parameters and rows of 8,192 tokens, in at most 40 minutes. With two
or more GPUs, a run over all of them is added. Parts that need missing packages are reported and skipped. Each part has its own
processes and deadline, and the results are written after each part.

--cpu-rehearsal uses tiny sizes on the CPU to check that everything runs; it writes no results unless --results names a file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_kernel
import gpu_report
import results
import sides
import yaml
from gpu_report import COMPILE, LAUNCHER, Measured, Side

from launcher import hardware
from launcher.config.compose import conf_dir

HERE = Path(__file__).resolve().parent
_SETTINGS = (
    *("data=jsonl", "data.eval_fraction=0", "tracking=none", "eval.at_start=false", "eval.sample=false", "eval.every=0"),
    *("export.enabled=false", "checkpoint.save_every=0", "optim.lr=1e-5"),
)
# Settings that are off by default.
_VARIANTS = (COMPILE,)
# Few steps, because startup takes most of such a run.
_VARIANT_STEPS = 7
_TESTS_S, _KERNEL_S, _PREPARE_S, _SIDE_S = 150.0, 60.0, 120.0, 150.0
# A rehearsal gets more time because its CPUs are shared with other work.
_CPU_FACTOR = 8
# A part starts only if at least this many seconds are left.
_LEAST_S = 5.0
_FLASH_OF_OTHERS = ("flash_attention_3", "flash_attention_2")
_OUT_OF_MEMORY = re.compile("out of memory|OutOfMemoryError", re.IGNORECASE)
# A message that GPU runs print.
_ATTENTION = re.compile(r"attention is computed by (\w+)")
_TOO_LARGE = re.compile(r"needs? \d+ GiB per GPU")
_EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit)\b")
# More chats than the steps need, because other programs' packing wastes more.
_SPARE_TOKENS = 1.3


@dataclass(frozen=True)
class Case:
    """A model preset with config changes; each step trains `rows` of `row_tokens` on each GPU."""

    preset: str
    row_tokens: int
    rows: int
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    steps: int = 10
    warmup: int = 3


# If the GPU is too small for the first case, the next one that fits is measured.
STANDARD = (Case("qwen3_1_7b", 4096, 16), Case("qwen3_0_6b", 4096, 16), Case("smollm2_135m", 2048, 16))
FULL = (Case("qwen3_0_6b", 4096, 16), Case("qwen2_5_3b", 4096, 16), Case("qwen3_1_7b", 8192, 8))
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
REHEARSAL = (Case("qwen3_0_6b", 128, 2, {**_TINY, "head_dim": 16, "vocab_size": 512}, "fp32", steps=3, warmup=1),)
_SMALL_KERNEL = ("--tokens=256", "--row-tokens=128", "--heads=4", "--kv-heads=2", "--head-dim=16")


def main() -> None:
    # On SIGTERM, unwind so that all started processes are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = sides.parser(__doc__, rounds=None)
    parser.add_argument("size", nargs="?", choices=("standard", "full"), default="standard")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, help="time for all parts (default: 10, full: 40; 5 more on several GPUs)")
    args = parser.parse_args()
    if args.cpu_rehearsal:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = hardware.device()
    if device.kind != "cuda" and not args.cpu_rehearsal:
        problem = f": {device.problem}" if device.problem else ""
        raise SystemExit(f"no GPU was found{problem}; --cpu-rehearsal tries it on the CPU")
    usual = (40 if args.size == "full" else 10) * (_CPU_FACTOR if args.cpu_rehearsal else 1)
    # The run over all GPUs comes last.
    minutes = args.minutes or usual + (5 if device.kind == "cuda" and device.count > 1 else 0)
    file = None if args.cpu_rehearsal and args.results == sides.RESULTS else args.results
    with tempfile.TemporaryDirectory(prefix="launcher-gpu-") as folder:
        proof = Proof(Path(folder), minutes * 60, args.size == "full", args.cpu_rehearsal, file)
        proof.run()
    print(f"\n{proof.text()}")
    # Missing packages are not a failure; failed parts are.
    raise SystemExit(1 if proof.num_failed else 0)


class LeftOut(Exception):
    """Raised for a part that this machine cannot run, which is not a failure."""


class Proof:
    """Runs the parts one after another, and writes the results after each."""

    def __init__(self, folder: Path, seconds: float, is_full: bool, on_cpu: bool, results_file: Path | None) -> None:
        self.folder, self.is_full, self.on_cpu, self.results_file = folder, is_full, on_cpu, results_file
        self.began, self.ends_at = time.monotonic(), time.monotonic() + seconds
        device = hardware.device()
        self.num_gpus = 0 if on_cpu else device.count
        self.measured = Measured(device.name)
        self.num_failed = 0
        self._before = results_file.read_text(encoding="utf-8") if results_file is not None and results_file.is_file() else ""
        self._dated = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {'' if on_cpu else f'{device.count} x '}{device.name}"

    def run(self) -> None:
        """Run as many parts as time allows, the most important case first."""
        for kernel in gpu_kernel.KERNELS:
            self.part(f"kernel {kernel}", _KERNEL_S, partial(self.measure_kernel, kernel))
        self.part("tests marked gpu", _TESTS_S, self.run_tests)
        for case in REHEARSAL if self.on_cpu else STANDARD:
            if self.measure_case(case):
                break
        if self.is_full and not self.on_cpu:
            for case in FULL:
                self.measure_case(case)
        if self.num_gpus > 1:
            self.measure_case(STANDARD[0], num_ranks=self.num_gpus)

    def part(self, name: str, limit_s: float, run: Callable[[float], None]) -> bool:
        """Run a part with its deadline; return whether it succeeded. A failure is noted, and the other parts still run."""
        seconds = min(limit_s * (_CPU_FACTOR if self.on_cpu else 1), self.ends_at - time.monotonic())
        if seconds < _LEAST_S:
            self.measured.notes.append(f"{name}: left out, the time is over")
            return False
        began = time.monotonic()
        try:
            run(seconds)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            return True
        except LeftOut as reason:
            print(f"{name}: left out: {reason}", flush=True)
            self.measured.notes.append(f"{name}: left out: {reason}")
            return False
        except (SystemExit, OSError, ValueError, KeyError, StopIteration, subprocess.SubprocessError) as error:
            self.num_failed += 1
            print(f"{name}: failed after {time.monotonic() - began:.0f} s:\n{error}", flush=True)
            self.measured.notes.append(f"{name}: FAILED: {_last_line(error)}")
            return False
        finally:
            self.write()

    def measure_kernel(self, kernel: str, seconds: float) -> None:
        command = [sys.executable, str(HERE / "gpu_kernel.py"), kernel, *(_SMALL_KERNEL if self.on_cpu else ())]
        try:
            output = sides.run(command, self.folder / f"{kernel}.log", os.environ.copy(), seconds)
            self.measured.kernels[kernel] = _json_line(output)
        except SystemExit as error:
            self.measured.kernels[kernel] = {"failed": _last_line(error)}
            raise
        if not self.measured.kernels[kernel].get("is_isolated", True):
            raise SystemExit(f"packed documents affect each other with {kernel}")

    def run_tests(self, seconds: float) -> None:
        """Run the tests marked gpu, which pytest skips on CPUs."""
        if find_spec("pytest") is None:
            self.measured.tests = "Tests marked gpu: pytest is not installed."
            return
        tests = HERE.parent / "tests"
        files = [str(file) for file in sorted(tests.rglob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
        report = self.folder / "tests.xml"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", f"--basetemp={self.folder / 'pytest'}"]
        problem: SystemExit | None = None
        try:
            sides.run([sys.executable, "-m", "pytest", *options, *files], self.folder / "tests.log", os.environ.copy(), seconds)
        except SystemExit as error:
            problem = error
        if not report.is_file():
            raise problem or SystemExit("pytest has written no report")
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
        failed = [str(test.attrib["name"]) for test in suite.iter("testcase") if {"failure", "error"} & {one.tag for one in test}]
        passed = total - skipped - len(failed)
        self.measured.tests = f"Tests marked gpu: {passed} passed, {len(failed)} failed, {skipped} skipped."
        if failed or problem:
            raise SystemExit(f"{problem or ''}\ntests failed: {', '.join(failed)}")

    def measure_case(self, case: Case, num_ranks: int = 1) -> bool:
        """Measure all sides of a case; return False if the model does not fit on the GPU."""
        name = f"{case.preset}, rows of {case.row_tokens:,} tokens, {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}"
        prepared: list[sides.Prepared] = []
        if not self.part(f"{name}: inputs", _PREPARE_S, lambda s: prepared.append(self.prepare(case, num_ranks, s))):
            return False
        self.measured.cases[name] = []
        has_liger, has_trl = find_spec("liger_kernel") is not None, sides.has_trl()
        liger = has_liger and not self.on_cpu
        for missing, package in ((not has_trl, "TRL"), (not liger, "Liger")):
            note = f"{package} {'is not used on CPUs' if self.on_cpu and package == 'Liger' else 'is not installed'}"
            if missing and note not in self.measured.notes:
                self.measured.notes.append(note)
        self.part(f"{name}: launcher", _SIDE_S, lambda s: self.launcher_side(name, prepared[0], s, liger))
        if has_trl and num_ranks == 1:
            side = f"TRL{' with Liger' if liger else ''}"
            options = ("--liger",) if liger else ()
            self.part(f"{name}: {side}", _SIDE_S, lambda s: self.other_side(name, side, self.trl, options, prepared[0], s))
        self.part(
            f"{name}: bare loop", _SIDE_S, lambda s: self.other_side(name, "bare DeepSpeed loop", self.bare, (), prepared[0], s)
        )
        for setting in _VARIANTS:
            self.part(
                f"{name}: {setting}", _SIDE_S, lambda s, setting=setting: self.variant_side(name, prepared[0], s, liger, setting)
            )
        return True

    def prepare(self, case: Case, num_ranks: int, seconds: float) -> sides.Prepared:
        """Create the model, the chats, the data cache and the plan."""
        config = {**yaml.safe_load((conf_dir() / "model" / f"{case.preset}.yaml").read_text())["config"], **case.changes}
        folder = self.folder / f"{case.preset}-{case.row_tokens}-{num_ranks}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        # Cases with the same model share its weights.
        (models := self.folder / "models" / case.preset).mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            (folder / "model").symlink_to(models / "model")
        rows = case.rows * num_ranks
        tokens = int(_SPARE_TOKENS * case.steps * rows * case.row_tokens)
        options = [f"--config={folder / 'config.json'}", f"--dtype={case.dtype}", f"--folder={models}"]
        options += [f"--row-tokens={case.row_tokens}", f"--tokens={tokens}"]
        command = [sys.executable, str(HERE / "gpu_inputs.py"), *options]
        began = time.monotonic()
        memory = _json_line(sides.run(command, folder / "inputs.log", os.environ.copy(), seconds))
        (folder / "chats-of-data.jsonl").write_bytes((models / "chats.jsonl").read_bytes())
        overrides = [
            *(f"model={case.preset}", f"model.path={models / 'model'}", f"model.dtype={case.dtype}", *_SETTINGS),
            *(f"data.path={folder / 'chats-of-data.jsonl'}", f"data.max_length={case.row_tokens}"),
            *(f"train.global_batch_size={rows}", f"cluster.ranks_per_node={num_ranks}"),
        ]
        left_s = seconds - (time.monotonic() - began)
        try:
            prepared = sides.prepare(folder, overrides, case.steps, case.warmup, left_s)
        except SystemExit as error:
            if _TOO_LARGE.search(str(error)):
                raise LeftOut("the model does not fit on this GPU") from error
            raise
        peak, free_gib = prepared.plan.peak, memory["free_gib"]
        if peak is not None and free_gib is not None and peak.peak_gib > free_gib:
            raise LeftOut(f"{peak.peak_gib:.1f} GiB are planned, and {free_gib:.1f} GiB of the GPU are free")
        return prepared

    def variant_side(self, case: str, prepared: sides.Prepared, seconds: float, liger: bool, settings: str) -> None:
        """Measure the launcher with other settings, in fewer steps.

        Raises:
            LeftOut: on CPUs.
        """
        if self.on_cpu:
            raise LeftOut("not run, because a rehearsal on CPUs cannot show what it is worth on a GPU")
        steps = min(prepared.steps, _VARIANT_STEPS)
        fewer = replace(prepared, overrides=(*prepared.overrides, f"train.max_steps={steps}"), steps=steps)
        self.launcher_side(case, fewer, seconds, liger, settings)

    def launcher_side(self, case: str, prepared: sides.Prepared, seconds: float, liger: bool, settings: str = "") -> None:
        """Measure the launcher. With other `settings`, the side is named after them, so that it does not define the GPU's row."""
        if not self.on_cpu:
            prepared = prepared.with_overrides(f"model.liger={str(liger).lower()}", *settings.split())
        figures = sides.launcher_side(replace(prepared, timeout_s=seconds), without_last_save=True)
        plan = prepared.plan
        named = (_ATTENTION.match(text) for text in figures["messages"])
        kernel = next((match[1] for match in named if match), plan.config.model.attention)
        name = settings or f"{LAUNCHER}{' with Liger' if liger else ''}"
        self.measured.cases[case].append(Side(name, kernel, plan.checkpointing, plan, figures))
        self.measured.notes += [f"{case}: alert of the run: {text}" for text in figures["alerts"]]
        # NCCL's speed, if there are several ranks.
        self.measured.notes += [f"{case}: {text}" for text in figures["messages"] if text.startswith("all-reduce over")]

    def other_side(
        self, case: str, name: str, run: Callable[..., Any], options: tuple[str, ...], prepared: sides.Prepared, seconds: float
    ) -> None:
        """Run another program with the launcher's micro-batch. If it runs out of memory, halve it, then recompute activations."""
        ends_at = time.monotonic() + seconds
        for size, recompute in _attempts(prepared.plan.batch.micro_batch_size):
            if (left_s := ends_at - time.monotonic()) < _LEAST_S:
                break
            attempt = replace(prepared.with_micro_batch(size), timeout_s=left_s)
            # TRL flattens packed rows into one.
            kernel = self.kernel_of_others(run == self.trl or size == 1)
            try:
                figures = run(attempt, recompute, f"--attention={kernel}", *options)
            except SystemExit as error:
                if not _OUT_OF_MEMORY.search(str(error)):
                    raise
                print(f"{case}: {name}: out of memory with {size} rows{' recomputed' if recompute else ''}", flush=True)
                continue
            side = Side(name, kernel, "all" if recompute else "none", attempt.plan, figures)
            self.measured.cases[case].append(side)
            return
        raise SystemExit("out of memory or of time with every micro-batch")

    @staticmethod
    def trl(prepared: sides.Prepared, recompute: bool, *options: str) -> dict[str, Any]:
        return sides.trl_side(prepared, recompute, *options)

    @staticmethod
    def bare(prepared: sides.Prepared, recompute: bool, *options: str) -> dict[str, Any]:
        return sides.bare_side(prepared, *(["--recompute"] if recompute else []), *options)

    def kernel_of_others(self, is_one_row: bool) -> str:
        """Return FlashAttention if it works and all tokens are one row, which it needs to find documents; otherwise SDPA."""
        works = (name for name in _FLASH_OF_OTHERS if "forward_ms" in self.measured.kernels.get(name, {}))
        return next(works, "sdpa") if is_one_row else "sdpa"

    def text(self) -> str:
        """Return the body of the section in the results."""
        command = sides.typed("gpu.py", *(["full"] if self.is_full else []), *(["--cpu-rehearsal"] if self.on_cpu else []))
        seconds = f"{time.monotonic() - self.began:.0f} s in all."
        body = [f"{sides.FROM_TRAIN} {sides.machine()} {seconds}", "", *gpu_report.lines(self.measured), "", command]
        return "\n".join(body)

    def write(self) -> None:
        """Write all measurements so far."""
        if self.results_file is None:
            return
        text = results.with_section(self._before, f"GPU: {self.measured.card}", self._dated, self.text())
        self.results_file.write_text(text, encoding="utf-8")


def _attempts(micro_batch_size: int) -> Iterator[tuple[int, bool]]:
    """Yield micro-batch sizes and whether to recompute activations, from the fastest to the smallest."""
    size = micro_batch_size
    while size >= 1:
        yield size, False
        size //= 2
    yield 1, True


def _json_line(output: str) -> dict[str, Any]:
    """Return the JSON line, because libraries print to standard output too."""
    return dict(json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{"))))


def _last_line(error: BaseException) -> str:
    """Return the last line that names an exception, since torchrun prints more after it; otherwise the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line) and "ChildFailedError" not in line]
    return [type(error).__name__, *lines[-1:], *named[-1:]][-1][:300]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
