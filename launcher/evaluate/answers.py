"""Answers a share of the prompts: `python -m launcher.evaluate.answers FOLDER RANK WORLD_SIZE NUM_GPUS`.

NUM_GPUS is the number of GPUs of this process; 0 means the CPU. Processes communicate only through the folder of the evaluation:
each reads what all have written. They need no port and no collective.

At the end of a run, `report_answers` records the answers to a single held-out question.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from launcher.child_process import run_process
from launcher.data import cache_store
from launcher.data.checks import patterns
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.errors import LauncherError, RunError, describe, printable
from launcher.evaluate.evaluation_folder import (
    AnswerKey,
    AnswerStore,
    EvaluationAnswers,
    EvaluationFolder,
    EvaluationTask,
    SideAnswers,
    StoredAnswer,
    StyleScore,
    Weights,
    digest_prompts,
)
from launcher.evaluate.metrics import AnswerScorer
from launcher.evaluate.prompts import BasePrompts, ChosenStyles, PromptBatch, PromptStyle, choose_styles, write_as_trained
from launcher.evaluate.transformers_engine import Engine, TransformersEngine
from launcher.evaluate.weights import choose_dtype
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size
from launcher.runs import json_records
from launcher.security.folders import private_files
from launcher.security.redaction import printable_output
from launcher.tracking.progress import Pace, live_line, report_elapsed_time, time_left
from launcher.tracking.tracker import Composite
from launcher.tracking.verdicts import TUNED
from launcher.train.model import weights_gib

# A factor for the memory that loading needs beyond the weights.
_LOADING_FACTOR = 1.2
_POLL_S = 0.5
_SELECTION = "selection"
# Largest model that one process loads completely for a sampled answer, and the length of such an answer.
_MAX_SAMPLED_GIB, _SAMPLED_TOKENS = 20, 48


def answer_share(folder: EvaluationFolder, share: Share, num_gpus: int) -> None:
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
    device = "cuda" if num_gpus else "cpu"
    dtype = choose_dtype(config, device)
    if config.evaluate.vllm_python is not None:
        from launcher.evaluate.vllm_engine import VllmEngine

        python = Path(config.evaluate.vllm_python).expanduser()
        AnswerGeneration(folder, share, device, dtype).run(
            lambda weights: VllmEngine(python, weights, dtype=dtype, context=task.context, num_gpus=max(1, num_gpus))
        )
        return

    def load_engine(weights: Weights) -> Engine:
        model = Path(weights.folder)
        num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        if device == "cuda" and num_bytes * _LOADING_FACTOR > (free := torch.cuda.mem_get_info()[0]):
            raise RunError(
                "the model does not fit the memory of one GPU",
                where=weights.folder,
                value=f"its weights take {format_size(num_bytes)}, and {format_size(free)} are free",
                remedy="set evaluate.vllm_python to the Python of an environment with vLLM, and evaluate.vllm_gpus to the number "
                "of GPUs over which it divides the model",
            )
        code = None if task.code is None else Path(task.code)
        tokenizer, stop_ids = load_tokenizer(task.tokenizer), weights.stop_ids
        return TransformersEngine(model, config.model, tokenizer, dtype=dtype, device=device, stop_ids=stop_ids, code=code)

    AnswerGeneration(folder, share, device, dtype).run(load_engine)


@dataclass(frozen=True)
class Share:
    """The part of a process: `rank` of `world_size`. `say` reports its progress."""

    rank: int
    world_size: int
    say: Callable[[str], None] = lambda text: None


class AnswerGeneration:
    """All sides of one evaluation, from the view of one process."""

    def __init__(self, folder: EvaluationFolder, share: Share, device: str, dtype: str) -> None:
        self.task: EvaluationTask = folder.read_task()
        self._folder, self._share = folder, share
        self._device, self._dtype = device, dtype
        self._config = self.task.settings
        # The stores of all sets and sides, each with its number of prompts.
        self._stores: dict[str, tuple[AnswerStore, int]] = {}
        self._num_sides = 1 if self.task.base is None else 3 if self.task.shots else 2
        self._questions = {name: folder.read_questions(name) for name in self.task.sets}
        training = folder.read_questions()
        self._selection = training[self.task.num_examples :]
        self._tokenizer = load_tokenizer(self.task.tokenizer)
        examples = training[: self.task.num_examples]
        others = [*self._selection, *(one for several in self._questions.values() for one in several)]
        self._base_prompts = BasePrompts(self._tokenizer, self._config.data, examples, others)

    def run(self, make_engine: Callable[[Weights], Engine]) -> None:
        """Answer this process's share; the first process writes answers.json when all answers exist."""
        began = time.monotonic()
        sides: dict[str, list[SideAnswers]] = {name: [] for name in self.task.sets}
        scores: Mapping[PromptStyle, float] = {}
        if self.task.base is not None:
            with _load_on_first_use(make_engine, self.task.base) as engine:
                chosen = self._choose_styles(self.task.base, engine)
                scores = chosen.scores
                for style in filter(None, (chosen.zero_shot, chosen.few_shot)):
                    for name, questions in self._questions.items():
                        prompts = self._base_prompts.write(questions, style)
                        self._answer_set(sides, name, f"{style.shots}-shot", self.task.base, prompts, style, engine)
        encoder = Encoder(self._tokenizer, self._config.data)
        with _load_on_first_use(make_engine, self.task.tuned) as engine:
            for name, questions in self._questions.items():
                self._answer_set(sides, name, TUNED, self.task.tuned, write_as_trained(encoder, questions), None, engine)
        if self._share.rank == 0:
            for name, (store, count) in self._stores.items():
                self._await_answers([(store, count)], name)
                store.complete()
            compared = tuple(StyleScore(str(style), score) for style, score in scores.items())
            done = {name: tuple(answers) for name, answers in sides.items()}
            seconds = round(time.monotonic() - began, 1)
            shown = EvaluationAnswers(done, compared, self.task.engine, self._dtype, seconds, self._share.world_size)
            json_records.write(self._folder.answers, shown)

    def _choose_styles(self, base: Weights, engine: Callable[[], Engine]) -> ChosenStyles:
        settings, questions = self._config.evaluate, self._selection

        def score_styles(styles: Sequence[PromptStyle]) -> dict[PromptStyle, float]:
            stores = []
            for number, style in enumerate(styles, 1):
                prompts = self._base_prompts.write(questions, style)
                digest = digest_prompts(prompts.prompts, prompts.stop_strings)[:16]
                store = self._open_store(f"{_SELECTION}/{digest}", base, prompts, style)
                self._generate_missing(store, prompts, engine, f"choosing the prompt form, {number} of {len(styles)} ({style})")
                stores.append((store, len(questions)))
            self._await_answers(stores, "choosing the prompt form")
            scorer, scores = AnswerScorer(settings, self._folder.root), {}
            references, places = [one.reference for one in questions], [one.where for one in questions]
            for style, (store, _) in zip(styles, stores, strict=True):
                answers = store.read()
                generated = [answers[index] for index in range(len(questions))]
                scores[style] = float(scorer.score(scorer.metrics[0], generated, references, places).mean())
            return scores

        forms = self._base_prompts.forms([*questions, *(one for several in self._questions.values() for one in several)])
        if not questions:
            return ChosenStyles(
                PromptStyle(forms[0], 0, settings.instructions[0]),
                PromptStyle(forms[0], max(self.task.shots), settings.instructions[0]) if self.task.shots else None,
                {},
            )
        return choose_styles(forms, self.task.shots, settings.instructions, score_styles)

    def _answer_set(
        self,
        sides: dict[str, list[SideAnswers]],
        set_name: str,
        side: str,
        weights: Weights,
        prompts: PromptBatch,
        style: PromptStyle | None,
        engine: Callable[[], Engine],
    ) -> None:
        file_name = f"{set_name}/{side if side == TUNED else f'base-{side}'}"
        store = self._open_store(file_name, weights, prompts, style)
        number = 1 + len(sides[set_name])
        self._generate_missing(store, prompts, engine, f"answers {number} of {self._num_sides} ({set_name}, {side})")
        self._stores[f"{set_name}, {side}"] = (store, len(prompts.prompts))
        sides[set_name].append(SideAnswers(side, f"{file_name}.jsonl", _describe_style(style), sum(map(len, prompts.prompts))))

    def _open_store(self, name: str, weights: Weights, prompts: PromptBatch, style: PromptStyle | None) -> AnswerStore:
        key = AnswerKey(
            weights=weights.digest,
            config=weights.config,
            stop_ids=weights.stop_ids,
            prompts=digest_prompts(prompts.prompts, prompts.stop_strings),
            num_prompts=len(prompts.prompts),
            style=_describe_style(style),
            engine=self.task.engine,
            dtype=self._dtype,
            device=self._device,
            max_new_tokens=self._config.evaluate.max_new_tokens,
        )
        path = self._folder.root / name
        return AnswerStore(path.parent, path.name, key)

    def _generate_missing(self, store: AnswerStore, prompts: PromptBatch, engine: Callable[[], Engine], activity: str) -> None:
        """Generate and store the missing answers of this process's share, longest prompts first."""
        settings, existing = self._config.evaluate, store.read()
        order = sorted(range(len(prompts.prompts)), key=lambda i: (-len(prompts.prompts[i]), i))
        batches = [order[i : i + settings.prompts_per_batch] for i in range(0, len(order), settings.prompts_per_batch)]
        own = batches[self._share.rank :: self._share.world_size]
        num_existing, num_own, pace = sum(i in existing for batch in own for i in batch), sum(map(len, own)), Pace(longest_s=1.0)
        num_done = num_existing
        for batch in own:
            missing = [i for i in batch if i not in existing]
            if not missing:
                continue
            left = time_left(num_done - num_existing, num_own - num_existing, pace.elapsed_s)
            text = f"{activity}: {num_done} of {num_own} answers{left}"
            self._share.say(text)
            # On CPUs, a batch may take many minutes. `say` decides which lines are due.
            with report_elapsed_time(text, self._share.say, pace):
                model, began = engine(), time.monotonic()
                generated = model.generate(
                    [prompts.prompts[i] for i in missing],
                    stop_strings=prompts.stop_strings,
                    max_new_tokens=settings.max_new_tokens,
                )
            is_one_gpu = self._device == "cuda" and settings.vllm_python is None
            gpu_s = round((time.monotonic() - began) / len(missing), 4) if is_one_gpu else 0.0
            answers = [StoredAnswer(**asdict(one), index=i, gpu_s=gpu_s) for i, one in zip(missing, generated, strict=True)]
            store.append(f"{self._share.rank:05d}", answers)
            num_done += len(missing)
        if num_own:
            self._share.say(f"{activity}: {num_done} of {num_own} answers")

    def _await_answers(self, stores: Sequence[tuple[AnswerStore, int]], activity: str) -> None:
        """Wait until all processes have stored their answers; if one fails, the program that started them ends all of them."""
        while not all(len(store.read()) == count for store, count in stores):
            self._share.say(f"{activity}: waiting for other processes")
            time.sleep(_POLL_S)


def _describe_style(style: PromptStyle | None) -> str:
    return "as in training" if style is None else str(style)


@contextmanager
def _load_on_first_use(make_engine: Callable[[Weights], Engine], weights: Weights) -> Iterator[Callable[[], Engine]]:
    """Yield a function that loads the model on first use, so that it is not loaded if all answers exist."""
    loaded: list[Engine] = []

    def get() -> Engine:
        if not loaded:
            loaded.append(make_engine(weights))
        return loaded[0]

    try:
        yield get
    finally:
        for engine in loaded:
            engine.close()


def report_answers(plan: LaunchPlan, exported: Path, device: str, tracker: Composite) -> None:
    """Record a held-out question, its reference answer, and the answers of the initial and of the exported model.

    Does nothing without `eval.sample`, without held-out questions, or if the model is too large for one process. A failure is
    only an alert: the run is complete, and the data cache may have been removed meanwhile.
    """
    try:
        samples = cache_store.read_samples(plan.data.cache_dir) if plan.data and plan.config.eval.sample else []
        if not samples or weights_gib(plan) > _MAX_SAMPLED_GIB:
            return
        sample = samples[0]
        _record_text(tracker, f"held-out question: {sample['prompt']}")
        _record_text(tracker, f"reference answer:  {' '.join(sample['answer'].split())}")
        if plan.config.model.init == "pretrained" and plan.model.path and plan.model.has_weights:
            before = _continue_prompt(plan, Path(plan.model.path), sample["prompt_ids"], device)
            _record_text(tracker, f"answer before:     {before}")
        _record_text(tracker, f"answer after:      {_continue_prompt(plan, exported, sample['prompt_ids'], device)}")
    except Exception as error:
        tracker.event("alert", f"the held-out question is not answered: {describe(error)}")


def _record_text(tracker: Composite, text: str) -> None:
    """Record a text without secrets: a model may repeat a key from its training data, and events are kept in logs."""
    (redacted,) = patterns.redact([text])
    tracker.event("sample", redacted)


def _continue_prompt(plan: LaunchPlan, folder: Path, prompt_ids: list[int], device: str) -> str:
    """Continue a prompt greedily with the model in `folder`; the answer is on one line."""
    tokenizer, settings = load_tokenizer(plan.model.tokenizer_path or ""), plan.config.model
    code = Path(plan.model.path) if plan.model.path else None
    turn_ends = plan.data.turn_end_ids if plan.data else ()
    stop_ids = [i for i in (tokenizer.eos_token_id, *turn_ends) if i is not None]
    engine = TransformersEngine(folder, settings, tokenizer, dtype=settings.dtype, device=device, stop_ids=stop_ids, code=code)
    (answer,) = engine.generate([prompt_ids], stop_strings=(), max_new_tokens=_SAMPLED_TOKENS)
    engine.close()
    return " ".join(answer.text.split())


def main(argv: Sequence[str]) -> int:
    folder, (rank, world_size, num_gpus) = EvaluationFolder(Path(argv[0])), map(int, argv[1:4])
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # Libraries log names from other users' files to the command's terminal.
        with printable_output(), private_files(), live_line(sys.stdout) as (say, make_pace):
            pace = make_pace()
            share = Share(rank, world_size, lambda text: say(text) if rank == 0 and pace.is_due() else None)
            answer_share(folder, share, num_gpus)
    except LauncherError as error:
        # On a cluster, the command shows the nodes' output.
        print(printable(str(error)), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_process(main)
