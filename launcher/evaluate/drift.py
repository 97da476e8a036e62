"""Compares prompts with a run's training prompts: `python -m launcher.evaluate.drift PLAN_JSON PROMPTS [--likelihood]`.

Torch is loaded only if models score the prompts. Progress goes to standard error, one JSON object to standard output.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher import hardware
from launcher.checkpoint import store
from launcher.child_process import print_result, run_process
from launcher.data import row_layout
from launcher.data.checks import patterns
from launcher.data.sources import files
from launcher.data.sources.documents import Document
from launcher.data.sources.formats import FORMATS, detect_format
from launcher.data.sources.reading import find_shared_completions
from launcher.data.split import Split
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.data.triage import compute_mean_losses
from launcher.errors import DataError, LauncherError, Problem
from launcher.evaluate.document_losses import Progress, ScorePass, score_passes, temporary_folder
from launcher.evaluate.weights import find_scored_weights
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import read_export
from launcher.tracking.progress import show_documents

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]

# Number of prompts to compare from each side, sampled at random; with fewer than the second, no test finds anything.
MAX_PROMPTS, MIN_PROMPTS = 2_000, 10
# Prompts and tokens per side that models score: enough for the test to find relevant differences.
_MAX_SCORED, _MAX_TOKENS = 200, {"cpu": 12_288, "cuda": 131_072}
BASE, TUNED = "base", "tuned"
# Maps the prompt's key to the answer's: a row with both is a training row.
_ANSWER_KEYS = {"prompt": "completion", "question": "answer", "instruction": "output"}
_ANSWERING_ROLES = ("assistant", "gpt", "model")
# A made-up answer: formats and chat templates require one.
_ANSWER = "answer"
# Significance level of all tests together.
SIGNIFICANCE = 0.01
# A difference that a test detects with many prompts may be too small to matter.
MAX_UNUSUAL, MAX_LENGTH_CHANGE = 0.10, 0.25
# A prompt is unusual, or unlikely, if it is farther from training than all but this share of the training prompts.
RARE = 0.05
_NUM_DIMENSIONS, _MIX = 4096, 0x9E3779B97F4A7C15
_NUM_FARTHEST, _MAX_TEXT_CHARS = 5, 200


@dataclass(frozen=True)
class Prompt:
    """A prompt as in training: its place, its tokens, and the part that a person wrote."""

    where: str
    tokens: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Measure:
    """One property of the prompts, in training and now; a difference that is significant by `p_value` matters if `is_large`."""

    name: str
    title: str
    training: float
    now: float
    p_value: float
    is_large: bool


@dataclass(frozen=True)
class FarPrompt:
    """A prompt unlike any training prompt; `similarity` is the cosine with the nearest one."""

    where: str
    similarity: float
    text: str


@dataclass(frozen=True)
class DriftReport:
    """How prompts compare with those of training; `gaps` says which models have not scored them, and why."""

    has_drifted: bool
    sentence: str
    num_prompts: int
    num_training: int
    measures: tuple[Measure, ...]
    farthest: tuple[FarPrompt, ...]
    gaps: tuple[str, ...] = ()


def find_drift(run: RunDir, path: Path, with_likelihood: bool, on_progress: Progress) -> DriftReport:
    """Compare the prompts in a file with those in the run's training data; both models score them if `with_likelihood`."""
    plan = run_store.load_plan(run)
    if not with_likelihood:
        import_tokenizers_without_torch()
    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    generator = np.random.default_rng(plan.config.run.seed)
    training = read_training_prompts(plan, generator)
    rows = (one for block in files.read_blocks(path, str(path)) for one in files.parse_block(block))
    documents, completions = [parse_prompt(row, where) for row, where in rows], find_shared_completions(plan.config.data)
    prompts = encode_prompts(documents, completions, Encoder(tokenizer, plan.config.data), generator)
    if min(len(training), len(prompts)) < MIN_PROMPTS:
        few = f"too few prompts to compare: {len(prompts)} in the file, {len(training)} in the training data"
        raise DataError(few, where=str(path), remedy=f"compare at least {MIN_PROMPTS}; data without prompts has none")
    if not with_likelihood:
        return compare_prompts(prompts, training, {})
    # The run's result is the exported step, or else the newest.
    record, steps = read_export(run), [one.step for one in store.list_checkpoints(run.checkpoints)]
    tuned_step = record.step if record is not None and record.step in steps else None
    gaps, losses = list[str](), dict[str, tuple[Numbers, Numbers]]()
    # A model that was trained on the training prompts finds them likely because it has seen them.
    for name in (BASE,) if plan.config.data.train_on == "all" else (BASE, TUNED):
        try:
            weights = find_scored_weights(run, plan, 0 if name == BASE else tuned_step)
        except LauncherError as error:
            if name == TUNED:
                raise
            gaps.append(f"{name} model: {error.problems[0].message}")
            continue
        with ExitStack() as stack:
            passes = list(_make_passes(plan, name, prompts, training, stack))
            scored = score_passes(plan, weights, passes, on_progress)
            now, before = (compute_mean_losses(one.open(), part)[1] for one, part in zip(passes, scored, strict=True))
        losses[name] = now[~np.isnan(now)], before[~np.isnan(before)]
    return compare_prompts(prompts, training, losses, gaps)


def _make_passes(
    plan: LaunchPlan, model: str, prompts: Sequence[Prompt], training: Sequence[Prompt], stack: ExitStack
) -> Iterator[ScorePass]:
    """Yield the passes over prompts and training prompts, without losses of tokens that all share, such as the template's."""
    data, max_tokens = plan.config.data, _MAX_TOKENS[hardware.device().kind]
    everything = [one.tokens for one in (*prompts, *training)]
    begin, end = (
        next((i for i, one in enumerate(zip(*several, strict=False)) if len({*one}) > 1), min(map(len, several)))
        for several in (everything, [tokens[::-1] for tokens in everything])
    )
    for title, side in (("prompts", prompts), ("training prompts", training)):
        tokens = [np.asarray(one.tokens[: data.max_length], np.uint32) for one in side[:_MAX_SCORED]]
        tokens = [one for one, total in zip(tokens, np.cumsum([len(one) for one in tokens]), strict=True) if total <= max_tokens]
        # Nothing precedes a first token.
        masks = [np.arange(len(one)) >= max(1, begin) for one in tokens]
        masks = [mask & (np.arange(len(mask)) < len(mask) - end) for mask in masks]
        lengths = np.array([len(one) for one in tokens], np.int64)
        folder = stack.enter_context(temporary_folder())
        trained = np.concatenate(masks).astype(np.uint8)
        facts, _ = row_layout.write_documents(folder, np.concatenate(tokens), trained, lengths, np.zeros_like(lengths), data)
        yield ScorePass(title=f"{model} model, {title}", facts=facts)


def read_training_prompts(plan: LaunchPlan, generator: np.random.Generator) -> list[Prompt]:
    """Return a sample of the training documents, each up to its last answer."""
    if plan.data is None:
        raise DataError(Problem("the run has no data cache", where=plan.run_dir, remedy="name a run that was trained"))
    split = Split.open(plan.data)
    prompts = []
    for number in generator.permutation(split.num_docs)[:MAX_PROMPTS]:
        document = slice(split.docs[number], split.docs[number + 1])
        # The beginning of each span of trained tokens.
        starts = np.flatnonzero(np.diff(np.asarray(split.trained[document]).astype(np.int8), prepend=0) == 1)
        tokens = np.asarray(split.tokens[document])[: starts[-1] if len(starts) else 0].tolist()
        if tokens:
            prompts.append(Prompt(f"training document {number}", tuple(tokens)))
    return prompts


def parse_prompt(row: dict[str, Any], where: str) -> Document:
    """Return a row's prompt with a made-up answer. For a chat, the prompt is everything before the last answer."""
    row = {**row, **{answer_key: _ANSWER for key, answer_key in _ANSWER_KEYS.items() if key in row}}
    for key, role_key, turn in (
        ("messages", "role", {"role": "assistant", "content": _ANSWER}),
        ("conversations", "from", {"from": "gpt", "value": _ANSWER}),
    ):
        if isinstance(turns := row.get(key), list):
            while turns and isinstance(turns[-1], dict) and turns[-1].get(role_key) in _ANSWERING_ROLES:
                turns = turns[:-1]
            row[key] = [*turns, turn]
    if list(row) == ["text"]:
        row = {"prompt": row["text"], "completion": _ANSWER}
    return FORMATS[detect_format(row, where)].parse(row, where)


def encode_prompts(
    documents: Sequence[Document], completions: str, encoder: Encoder, generator: np.random.Generator
) -> list[Prompt]:
    """Return a sample of the prompts, formatted as in training."""
    prompts = []
    for number in generator.permutation(len(documents))[:MAX_PROMPTS]:
        written = encoder.prompt(encoder.write_as_chat(documents[number], completions))
        if written is not None:
            # Redact before shortening: a truncated credential has no recognizable form.
            (shown,) = patterns.redact([written[0]])
            prompts.append(Prompt(documents[number].where, tuple(written[1]), shown))
    return prompts


def compare_prompts(
    prompts: Sequence[Prompt],
    training: Sequence[Prompt],
    losses: Mapping[str, tuple[Numbers, Numbers]],
    gaps: Sequence[str] = (),
) -> DriftReport:
    """Compare prompts with training prompts, both random samples.

    `losses` are the mean losses in nats per token, of prompts and of training prompts, by the name of a model.
    """
    # Both the prompts and one half of the training prompts are compared with the other half, which neither contains.
    known = [one.tokens for one in training[::2]]
    vectors = make_vectors(known, known)
    nearest, usual = (
        (make_vectors([one.tokens for one in side], known) @ vectors.T).max(axis=1) for side in (prompts, training[1::2])
    )
    unusual = float((nearest < np.quantile(usual, RARE)).mean())
    p_value = kolmogorov_smirnov_p_value(nearest, usual)
    words = Measure("words", "unlike all others in training", RARE, unusual, p_value, unusual > MAX_UNUSUAL)
    now, before = (np.array([len(one.tokens) for one in side], dtype=np.float64) for side in (prompts, training))
    medians = float(np.median(before)), float(np.median(now))
    is_large = abs(medians[1] / max(1.0, medians[0]) - 1) > MAX_LENGTH_CHANGE
    measures = [words, Measure("lengths", "median length in tokens", *medians, kolmogorov_smirnov_p_value(now, before), is_large)]
    for model, (now, before) in losses.items():
        unlikely = float((now > np.quantile(before, 1 - RARE)).mean())
        medians = float(np.median(before)), float(np.median(now))
        name, title = f"likelihoods ({model} model)", f"median loss per token, {model} model"
        measures.append(Measure(name, title, *medians, kolmogorov_smirnov_p_value(now, before), unlikely > MAX_UNUSUAL))
    differing = [one for one in measures if one.p_value < SIGNIFICANCE / len(measures)]
    has_drifted = any(one.is_large for one in differing)
    begin = "The prompts have drifted" if has_drifted else "The prompts differ slightly from the training prompts"
    sentence = f"{begin}: {' and '.join(f'different {one.name} (p = {one.p_value:.2g})' for one in differing)}."
    if not differing:
        p_value = min(1.0, len(measures) * min(one.p_value for one in measures))
        sentence = f"The prompts are like the training prompts (p = {p_value:.2g})."
    farthest = [
        FarPrompt(prompts[i].where, float(nearest[i]), " ".join(prompts[i].text.split())[:_MAX_TEXT_CHARS])
        for i in np.argsort(nearest, kind="stable")[:_NUM_FARTHEST]
    ]
    return DriftReport(has_drifted, sentence, len(prompts), len(training), tuple(measures), tuple(farthest), tuple(gaps))


def make_vectors(prompts: Sequence[Sequence[int]], training: Sequence[Sequence[int]]) -> Vectors:
    """Return unit vectors of TF-IDF weights, float32 [prompts, dimensions]; zeros for a prompt without weighted tokens.

    The weight of a token depends on how many training prompts contain it: tokens of all, such as the chat template's, have none.
    Token ids share the dimensions by a hash.
    """
    counts = Counter(token for prompt in training for token in {*prompt})
    vectors = np.zeros((len(prompts), _NUM_DIMENSIONS), dtype=np.float32)
    for row, prompt in zip(vectors, prompts, strict=True):
        for token, count in Counter(prompt).items():
            weight = np.log((1 + len(training)) / (1 + counts[token])) * (1 + np.log(count))
            hashed = (token * _MIX) & 0xFFFF_FFFF_FFFF_FFFF
            row[(hashed >> 20) % _NUM_DIMENSIONS] += weight if hashed >> 63 else -weight
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, lengths, out=vectors, where=lengths > 0)
    return vectors


def kolmogorov_smirnov_p_value(first: Numbers, second: Numbers) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test, by the asymptotic distribution.

    Numerical Recipes, 3rd edition, section 14.3.3. With ties the p-value is too large, which errs on the side of no difference.
    """
    values = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second)]
    effective = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    x = (effective + 0.12 + 0.11 / effective) * float(np.abs(shares[0] - shares[1]).max())
    if x < 0.2:
        # The series converges slowly here, to 1.
        return 1.0
    total = sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.evaluate.drift")
    parser.add_argument("plan", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--likelihood", action="store_true")
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.plan.absolute().parent)

    def describe() -> dict[str, Any]:
        with show_documents("rows") as on_progress:
            return dict(json_records.encode(find_drift(run, arguments.prompts, arguments.likelihood, on_progress)))

    return print_result(describe)


if __name__ == "__main__":
    run_process(main)
