"""What follows the last step, on rank 0 alone: the Hugging Face folder, its proof, and an answer to read."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from launcher.checkpoint.export import export
from launcher.data import cache
from launcher.data.chat import load_tokenizer
from launcher.errors import CheckpointError, ExportError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.tracker import Composite
from launcher.train.model import DTYPES

# Largest model that one process loads whole for a sample answer.
_LARGEST_SAMPLED_GIB = 20


def finish(plan: LaunchPlan, checkpoint: Path, tracker: Composite) -> None:
    """Export `checkpoint`, compare it with the trained engine's logits, and answer a held-out question.

    Raises:
        ExportError: where the folder cannot be written, or does not compute what the trained model computed.
    """
    try:
        _finish(plan, checkpoint, tracker)
    except CheckpointError as error:
        raise ExportError(error.problems) from error
    except OSError as error:
        raise ExportError(
            f"training is complete and saved, but the Hugging Face folder could not be written: {error.strerror}",
            where=str(error.filename or plan.run_dir),
            remedy=f"then: python -m launcher export {plan.run_dir}",
        ) from error


def _finish(plan: LaunchPlan, checkpoint: Path, tracker: Composite) -> None:
    gc.collect()
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        weights_gib = _weights_gib(plan)
        free_gib = torch.cuda.mem_get_info()[0] / 2**30
        device = "cuda" if 2 * weights_gib < free_gib else "cpu"
    config, folder = plan.config, RunDir(Path(plan.run_dir)).export
    if not config.train.export:
        return
    result = export(
        checkpoint,
        model=Path(plan.model.path) if plan.model.path else plan.model.config,
        tokenizer=Path(plan.model.tokenizer_path) if plan.model.tokenizer_path else None,
        out=folder,
        dtype=config.model.dtype,
        parity_device=device,
        trust_remote_code=config.model.trust_remote_code,
    )
    if result.parity is not None:
        tracker.event(
            "export",
            f"Hugging Face folder: {folder} ({result.dtype}; loaded back, mean KL to the trained model "
            f"{result.parity.mean_kl:.1e} over {result.parity.num_tokens} tokens)",
            path=str(folder),
            mean_kl=result.parity.mean_kl,
        )
    if config.train.sample:
        _answer_before_and_after(plan, folder, device, tracker)


def _weights_gib(plan: LaunchPlan) -> float:
    return plan.model.num_params * DTYPES[plan.config.model.dtype].itemsize / 2**30


def _answer_before_and_after(plan: LaunchPlan, exported: Path, device: str, tracker: Composite) -> None:
    samples = cache.read_samples(plan.data.cache_dir) if plan.data else []
    if not samples or _weights_gib(plan) > _LARGEST_SAMPLED_GIB:
        return
    sample = samples[0]
    tracker.event("sample", f"held-out question: {sample['prompt']}")
    tracker.event("sample", f"reference answer:  {' '.join(sample['answer'].split())}")
    if plan.config.model.init == "pretrained" and plan.model.path and plan.model.has_weights:
        tracker.event("sample", f"answer before:     {_answer(plan, Path(plan.model.path), sample['prompt_ids'], device)}")
    tracker.event("sample", f"answer after:      {_answer(plan, exported, sample['prompt_ids'], device)}")


@torch.no_grad()
def _answer(plan: LaunchPlan, folder: Path, prompt_ids: list[int], device: str) -> str:
    """Greedy continuation of a prompt by the model in `folder`, on one line."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    remote = plan.config.model.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[plan.config.model.dtype], trust_remote_code=remote)
    model.to(device).eval()
    settings = GenerationConfig(
        max_new_tokens=plan.config.train.sample_max_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    prompt = torch.tensor([prompt_ids], device=device)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return " ".join(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split())
