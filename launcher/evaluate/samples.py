"""Sampled answers: the model's answers to a held-out question before and after training."""

from __future__ import annotations

from pathlib import Path

from launcher.data import cache_store
from launcher.data.checks import patterns
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.evaluate.transformers_engine import TransformersEngine
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import Composite
from launcher.train.model import weights_gib

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
    _record_text(tracker, f"held-out question: {sample['prompt']}")
    _record_text(tracker, f"reference answer:  {' '.join(sample['answer'].split())}")
    if plan.config.model.init == "pretrained" and plan.model.path and plan.model.has_weights:
        _record_text(tracker, f"answer before:     {_continue_prompt(plan, Path(plan.model.path), sample['prompt_ids'], device)}")
    _record_text(tracker, f"answer after:      {_continue_prompt(plan, exported, sample['prompt_ids'], device)}")


def _record_text(tracker: Composite, text: str) -> None:
    """Record a text without secrets: a model may repeat a key from its training data, and events are kept in logs."""
    (redacted,) = patterns.redact([text])
    tracker.event("sample", redacted)


def _continue_prompt(plan: LaunchPlan, folder: Path, prompt_ids: list[int], device: str) -> str:
    """Continue a prompt greedily with the model in `folder`; the answer is on one line."""
    tokenizer, settings = load_tokenizer(plan.model.tokenizer_path or ""), plan.config.model
    code = Path(plan.model.path) if plan.model.path and settings.trust_remote_code else None
    turn_ends = plan.data.turn_end_ids if plan.data else ()
    stop_ids = [i for i in (tokenizer.eos_token_id, *turn_ends) if i is not None]
    engine = TransformersEngine(folder, settings, tokenizer, dtype=settings.dtype, device=device, stop_ids=stop_ids, code=code)
    (answer,) = engine.generate([prompt_ids], num_shared=0, stop_strings=(), max_new_tokens=_MAX_TOKENS)
    engine.close()
    return " ".join(answer.text.split())
