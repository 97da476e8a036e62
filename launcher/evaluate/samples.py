"""Sampled answers: the model's answers to a held-out question before and after training."""

from __future__ import annotations

from pathlib import Path

import torch

from launcher.data.cache import cache_store
from launcher.data.checks import patterns
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.models.private_code import code_option, folder_to_load
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import Composite
from launcher.train.model import DTYPES, read_own_config, weights_gib

# Largest model that one process loads completely for a sampled answer.
_MAX_SAMPLED_GIB = 20
_MAX_TOKENS = 48


def report_answers(plan: LaunchPlan, exported: Path, device: str, tracker: Composite) -> None:
    """Record a held-out question, its reference answer, and the answers of the initial and of the exported model.

    Does nothing without `eval.sample`, without held-out questions, or if the model is too large for one process.
    """
    samples = cache_store.read_samples(plan.data.cache_dir) if plan.data and plan.config.eval.sample else []
    if not samples or weights_gib(plan) > _MAX_SAMPLED_GIB:
        return
    sample = samples[0]
    _report(tracker, f"held-out question: {sample['prompt']}")
    _report(tracker, f"reference answer:  {' '.join(sample['answer'].split())}")
    if plan.config.model.init == "pretrained" and plan.model.path and plan.model.has_weights:
        _report(tracker, f"answer before:     {_answer(plan, Path(plan.model.path), sample['prompt_ids'], device)}")
    _report(tracker, f"answer after:      {_answer(plan, exported, sample['prompt_ids'], device)}")


def _report(tracker: Composite, text: str) -> None:
    """Record a text without secrets: a model may repeat a key from its training data, and events are kept in logs."""
    (redacted,) = patterns.redact([text])
    tracker.event("sample", redacted)


@torch.no_grad()
def _answer(plan: LaunchPlan, folder: Path, prompt_ids: list[int], device: str) -> str:
    """Continue a prompt greedily with the model in `folder`; the answer is on one line."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    settings = plan.config.model
    code = Path(plan.model.path) if plan.model.path else None
    path = folder_to_load(folder, settings.trust_remote_code, settings.code_digest, code)
    remote = code_option(settings.trust_remote_code, path)
    config = read_own_config(path, **remote)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=DTYPES[settings.dtype], **remote)
    model.to(device).eval()
    # `generate` takes missing values, such as num_beams, from the model's folder, which would not be greedy decoding.
    model.generation_config = GenerationConfig()
    stop_ids = [i for i in (tokenizer.eos_token_id, *(plan.data.turn_end_ids if plan.data else ())) if i is not None]
    generation = GenerationConfig(
        max_new_tokens=_MAX_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    prompt = torch.tensor([prompt_ids], device=device)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=generation)
    return " ".join(tokenizer.decode(output[0, prompt.shape[1] :].tolist(), skip_special_tokens=True).split())
