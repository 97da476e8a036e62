"""Answers a share of the prompts: `python -m launcher.worker.evaluation.answer FOLDER RANK WORLD_SIZE NUM_GPUS`.

NUM_GPUS is the number of GPUs assigned to this process; 0 means the CPU.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from launcher.child_process import die_with_parent, exit_on_termination
from launcher.config.schema import RunConfig
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.errors import LauncherError, RunError, printable
from launcher.evaluate.engines.transformers_engine import Engine, TransformersEngine
from launcher.evaluate.generation import AnswerGeneration, Share
from launcher.evaluate.task import CommandWatch, EvaluationFolder, EvaluationTask, Weights
from launcher.plan.quantities import format_size
from launcher.security.folders import private_files
from launcher.security.printable_stream import printable_output
from launcher.tracking.progress import live_line

_LOADING_FACTOR = 1.2


def answer(folder: EvaluationFolder, share: Share, num_gpus: int) -> None:
    """Answer a share of all prompts. Raises whatever the evaluation raises."""
    if num_gpus and not torch.cuda.is_available():
        # The CPU would take days, and its answers would differ from the other processes' answers.
        raise RunError(
            "a process of the evaluation was given a GPU, but finds none",
            where=socket.gethostname(),
            remedy="check this machine with nvidia-smi and: python -m launcher doctor",
        )
    task = folder.read_task()
    config = task.settings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(config, device)
    if config.evaluate.vllm_python is not None:
        from launcher.evaluate.engines.vllm_engine import NAME, VllmEngine, read_version

        python = Path(config.evaluate.vllm_python).expanduser()
        name = f"{NAME} {read_version(python) or ''}".strip()
        tokenizer, count = load_tokenizer(task.tokenizer), max(1, num_gpus)
        AnswerGeneration(folder, share, name, device, dtype).run(
            lambda weights: VllmEngine(python, weights, tokenizer, dtype=dtype, context=task.context, num_gpus=count)
        )
        return
    evaluation = AnswerGeneration(folder, share, TransformersEngine.name, device, dtype)
    evaluation.run(lambda weights: _load(task, config, weights, device, dtype))


def choose_dtype(config: RunConfig, device: str) -> str:
    """Return the dtype of the weights for answering on a device."""
    return config.model.dtype if device == "cuda" and config.model.dtype != "auto" else "bf16" if device == "cuda" else "fp32"


def _load(task: EvaluationTask, config: RunConfig, weights: Weights, device: str, dtype: str) -> Engine:
    folder = Path(weights.folder)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device == "cuda" and num_bytes * _LOADING_FACTOR > (free := torch.cuda.mem_get_info()[0]):
        raise RunError(
            "the model does not fit the memory of one GPU",
            where=weights.folder,
            value=f"its weights take {format_size(num_bytes)}, and {format_size(free)} are free",
            remedy="set evaluate.vllm_python to the Python of an environment with vLLM, and evaluate.vllm_gpus to the number of "
            "GPUs over which it divides the model",
        )
    return TransformersEngine(
        folder,
        config.model,
        load_tokenizer(task.tokenizer),
        dtype=dtype,
        device=device,
        stop_ids=weights.stop_ids,
        code=Path(task.code) if task.code is not None and config.model.trust_remote_code else None,
    )


def main(argv: Sequence[str]) -> int:
    folder, (rank, world_size, num_gpus) = EvaluationFolder(Path(argv[0])), map(int, argv[1:4])
    CommandWatch(folder.root).start()
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # Libraries log names from other users' files to the command's terminal.
        with printable_output(), private_files(), live_line(sys.stdout) as (say, make_pace):
            pace = make_pace()
            answer(folder, Share(rank, world_size, lambda text: say(text) if rank == 0 and pace.is_due() else None), num_gpus)
    except LauncherError as error:
        # On a cluster, the command shows the nodes' output.
        print(printable(str(error)), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    sys.exit(main(sys.argv[1:]))
