"""`launcher evaluate` on a run with a base model: killed and continued, counted again, refused if something is missing."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, held, json_lines, processes_of, slow_steps, status
from forked import Launch, require_exit
from pace import wait_for

from launcher.evaluate.metrics import normalized_words
from launcher.plan.launch_plan import LaunchPlan

pytestmark = pytest.mark.rest


DEADLINE_S = 600
NUM_PROMPTS = 6
SMALL = (
    f"evaluate.max_prompts={NUM_PROMPTS}",
    "evaluate.max_new_tokens=5",
    "evaluate.prompts_per_batch=2",
    "evaluate.metrics=[exact_match,token_f1]",
)


@pytest.fixture(scope="module")
def run(train_here: Launch, module_runs: Path) -> Path:
    """A one-step run that started from another run's weights and left them unchanged, without an export."""
    steps = ("train.max_steps=1", "eval.at_start=false", f"run.root={module_runs}")
    done = train_here(*TINY, *steps, "run.name=base")
    require_exit(done)
    source = ("model.init=pretrained", "model.config=null", "model.tokenizer=null", "model.path=run:base")
    # A step this small is lost in rounding.
    unchanged = ("optim.lr=1e-15", "model.dtype=fp32")
    done = train_here(*TINY, *source, *steps, *unchanged, "export.enabled=false", "run.name=tuned")
    require_exit(done)
    return module_runs / "tuned"


def test_a_killed_evaluation_leaves_no_process_and_continues(launch_here: Launch, start: Callable, run: Path) -> None:
    folder = run / "evaluations/step-00000001"
    with start("evaluate", str(run), *SMALL) as process:
        end = time.monotonic() + DEADLINE_S
        while not list(folder.glob("*/.*/*.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while processes_of(folder):
        assert time.monotonic() < end, processes_of(folder)
        time.sleep(0.1)
    before = [line for file in folder.glob("*/.*/*.jsonl") for line in file.read_text().splitlines()]
    assert before
    assert not (folder / "answers.json").exists()
    assert not (folder / "verdict.json").exists()
    done = launch_here("evaluate", str(run), *SMALL, "--json")
    require_exit(done)
    result = json.loads(done.stdout)["sets"]["held_out"]
    assert [*result["styles"]] == ["0-shot", "8-shot", "tuned"]
    questions = [json.loads(line)["reference"] for line in (folder / "held_out.questions.jsonl").read_text().splitlines()]
    for side, name in (("0-shot", "base-0-shot"), ("8-shot", "base-8-shot"), ("tuned", "tuned")):
        answers = [json.loads(line) for line in (folder / f"held_out/{name}.jsonl").read_text().splitlines()]
        assert [one["index"] for one in answers] == list(range(NUM_PROMPTS))
        matches = [normalized_words(one["text"]) == normalized_words(text) for one, text in zip(answers, questions, strict=True)]
        assert result["verdict"]["means"]["exact_match"][side] == pytest.approx(sum(matches) / NUM_PROMPTS)
    texts = {name: (folder / f"held_out/{name}.jsonl").read_text() for name in ("base-0-shot", "tuned")}
    assert texts["base-0-shot"] == texts["tuned"], "the base model against itself"
    assert result["verdict"]["outcome"] == "unclear"
    assert "The data cannot tell whether fine-tuning helped" in result["verdict"]["sentence"]
    zero_shot = [one for one in result["verdict"]["comparisons"] if one["baseline"] == "0-shot"]
    assert [(one["wins"], one["losses"], one["ties"]) for one in zero_shot] == [(0, 0, NUM_PROMPTS)] * 2
    assert not list(folder.glob("held_out/.*")), "no parts are left"
    assert not (folder / "weights").exists(), "nor the weights that were exported for the evaluation"
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))} == {0}


def test_checkpoints_are_answered_while_the_run_goes_on(
    train_here: Launch, launch_here: Launch, run: Path, module_runs: Path
) -> None:
    """Checkpoints are evaluated during training; then the run is cancelled in the middle of an evaluation and resumed."""
    going = module_runs / "going"
    source = ("model.init=pretrained", "model.config=null", "model.tokenizer=null", "model.path=run:base")
    every = ("checkpoint.save_every=20", "checkpoint.keep_last=1000", "eval.answers_every=20", "eval.at_start=false")
    settings = (*TINY, *source, *SMALL, *every, f"run.root={module_runs}", "run.name=going", "export.enabled=false")

    def folder(step: int) -> Path:
        return going / f"evaluations/step-{step:08d}"

    def said(kind: str = "answers") -> list[str]:
        return [line["text"] for line in json_lines(going / "events.jsonl") if line["kind"] == kind]

    done = train_here(*settings, "train.max_steps=100000", "--detach", **slow_steps(0.2))
    require_exit(done)
    # Wait for the checkpoint first: a suspended rank writes no shard.
    wait_for("the checkpoint", (going / "checkpoints/step-00000020/manifest.json").is_file, DEADLINE_S)
    with held(going, 20):
        wait_for("the answers of step 20", lambda: said(), DEADLINE_S)
        assert status(going)["state"] == "running"
        assert said()[0].startswith("answers of step 20: ")
        assert (folder(20) / "verdict.json").is_file()
    wait_for("the next evaluation", lambda: folder(40).exists(), DEADLINE_S)
    assert launch_here("cancel", str(going)).returncode == 0
    wait_for("the run to be cancelled", lambda: status(going)["state"] == "cancelled", DEADLINE_S)
    wait_for("its processes to end", lambda: not processes_of(going), 30)
    left = said()[-1]
    assert left.startswith("no answers yet: step 40")
    assert f"a resumed run continues with them; answer them with: python -m launcher evaluate {going} --step STEP" in left
    assert not [text for text in said("alert") if "answers" in text]
    last = status(going)["step"] + 1
    done = train_here("resume", str(going), f"train.max_steps={last}")
    require_exit(done)
    assert "training is complete, and the run waits for the answers of step" in done.stdout
    steps = list(range(20, last + 1, 20))
    assert [path.parent.name for path in sorted(going.glob("evaluations/*/verdict.json"))] == [folder(s).name for s in steps]
    assert not [text for text in said("alert") if "answers" in text]
    assert not processes_of(going)
    for step in steps[1:]:
        # The base model answers only once: its answers were in place before the questions were handed out.
        for side in ("base-0-shot", "base-8-shot"):
            record = folder(step) / f"held_out/{side}.json"
            assert record.stat().st_mtime_ns < (folder(step) / "task.json").stat().st_mtime_ns
            assert record.read_bytes() == (folder(20) / f"held_out/{side}.json").read_bytes()
        assert not (folder(step) / "weights").exists()
    shown = launch_here("status", str(going)).stdout
    assert f"step {steps[-1]}: " in next(line for line in shown.splitlines() if line.startswith("verdict"))
    assert launch_here("report", str(going)).returncode == 0
    assert "held_out, by step" in (going / "report.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--set", "held_outt"), "the run has no evaluation set held_outt"),
        (("evaluate.shots=900",), "900 examples cannot be shown to the base model"),
        (("evaluate.vllm_python=/missing/python",), "this is not the Python interpreter of an environment with vLLM"),
        (("--step", "7"), "there is no committed checkpoint of step 7"),
        (("optim.lr=1",), "optim.lr cannot change in an evaluation"),
        (("--limit", "5"), "--task-folder and --limit apply to tasks, but none are named"),
        (("--tasks", "/missing/questions.jsonl"), "the questions cannot be read"),
        (("--tasks", "arc_easy", "cluster=slurm"), "tasks are scored on this machine, which has no GPU"),
        (("evaluate.metrics=[numeric]", "evaluate.max_prompts=50"), "numeric cannot score"),
    ],
)
def test_what_cannot_be_evaluated_is_one_block(launch_here: Launch, run: Path, words: tuple[str, ...], message: str) -> None:
    done = launch_here("evaluate", str(run), *words)
    require_exit(done, 2)
    (first, *_) = [line for line in done.stderr.splitlines() if message in line] or [""]
    assert message in first, done.stderr
    assert "where: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_checkpoint_and_export_is_refused(launch_here: Launch, run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    for name in ("plan.json", "status.json"):
        (empty / name).write_bytes((run / name).read_bytes())
    (empty / "attempts").mkdir()
    done = launch_here("evaluate", str(empty))
    require_exit(done, 2)
    assert "resume" in done.stderr
    assert not os.path.exists(empty / "evaluations")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks: one with generated answers, one that runs them, one with its data on the Hub; and rows.jsonl."""
    rows = [{"question": f"What follows {number}?", "choices": ["a", "b c"], "answer": number % 2} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "answers.yaml").write_text(
        f"task: own_answers\n{local}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list: [{metric: exact_match}, {metric: bleu}]\n"
    )
    hub = local.replace("dataset_path: json", "dataset_path: someone/missing_data")
    (tmp_path / "hub.yaml").write_text(f"task: own_hub\n{hub}output_type: multiple_choice\ndoc_to_text: x\n")
    unsafe = f"task: own_code\n{local}output_type: multiple_choice\ndoc_to_text: x\nunsafe_code: true\n"
    (tmp_path / "code.yaml").write_text(f"{unsafe}doc_to_choice: '{{{{choices}}}}'\ndoc_to_target: answer\n")
    return tmp_path


def accuracies(model_folder: Path, tokenizer_folder: str, rows: list[dict]) -> list[float]:
    """Whether plain transformers finds each right choice the likeliest, after the question in the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    right = []
    for row in rows:
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        values = []
        for choice in row["choices"]:
            begin, end = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, choice))
            with torch.no_grad():
                logits = model(torch.tensor([begin + end])).logits[0, len(begin) - 1 : -1]
            values.append(float(logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()))
        right.append(float(values.index(max(values)) == row["answer"]))
    return right


def test_tasks_of_the_harness_compare_both_models(launch_here: Launch, run: Path, tasks: Path) -> None:
    """A file of multiple-choice questions is a task, too."""
    command = ("evaluate", str(run), "--task-folder", str(tasks), "--limit", "10", "--json", "evaluate.prompts_per_batch=4")
    done = launch_here(*command, "--tasks", f"{tasks}/rows.jsonl,own_answers", "--min-gain", "acc:base:0.9")
    require_exit(done, 3)
    shown = json.loads(done.stdout)
    assert list(shown["tasks"]) == ["rows", "own_answers"]
    assert [task["num_questions"] for task in shown["tasks"].values()] == [10, 10]
    assert shown["not_held"][0].startswith("rows: --min-gain acc:base:0.9 did not hold")
    assert "bleu" in shown["tasks"]["own_answers"]["whole"], "of all answers together, so that it has no interval"
    folder = run / "evaluations/step-00000001/benchmarks/rows"
    model = LaunchPlan.load(run / "plan.json").model
    expected = accuracies(Path(model.path or ""), model.tokenizer_path or "", json_lines(tasks / "rows.jsonl")[:10])
    for side in ("base", "tuned"):
        assert json.loads((folder / f"{side}.json").read_text())["samples"]["acc,none"] == expected
    assert json.loads((folder / "verdict.json").read_text())["means"]["acc"]["tuned"] == pytest.approx(sum(expected) / 10)
    assert launch_here("report", str(run)).returncode == 0
    assert "step 1, set rows" in (run / "report.html").read_text()
    before = {file: file.stat().st_mtime_ns for file in folder.parent.glob("*/*.json") if file.name != "verdict.json"}
    again = launch_here(*[word for word in command if word != "--json"], "--tasks", f"{tasks}/rows.jsonl")
    require_exit(again)
    assert "rows, 10 questions: The data cannot tell" in again.stdout
    assert all(file.stat().st_mtime_ns == before[file] for file in before), "scores that exist are used"
    refused = launch_here(*command, "--tasks", "own_answer,own_hub,own_code")
    assert refused.returncode == 2
    assert "did you mean own_answers?" in refused.stdout
    assert "hf download --repo-type dataset OWNER/NAME" in refused.stdout
    assert "runs code that the model has written" in refused.stdout


def median_prompt_loss(run: Path, rows: list[dict]) -> float:
    """The median of the prompts' mean losses over the user's tokens, computed with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = LaunchPlan.load(run / "plan.json").model
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer_path)
    model = AutoModelForCausalLM.from_pretrained(plan.path, dtype=torch.float32).eval()

    def tokens(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    first, second = tokens("a"), tokens("zz")
    begin = next(i for i, pair in enumerate(zip(first, second, strict=False)) if len({*pair}) > 1)
    end = next(i for i, pair in enumerate(zip(reversed(first), reversed(second), strict=False)) if len({*pair}) > 1)
    losses = []
    for row in rows:
        ids = torch.tensor([tokens(row["messages"][0]["content"])])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-float(log_probs[begin - 1 : len(ids[0]) - end - 1].mean()))
    return statistics.median(losses)


def test_prompts_of_today_are_compared_with_those_of_training(launch_here: Launch, run: Path, tmp_path: Path) -> None:
    other, wrong = tmp_path / "other.jsonl", tmp_path / "wrong.jsonl"
    recipe = "Boil {} potatoes with salt and butter, then mash them slowly and serve the mash with {} fried onions."
    rows = [{"messages": [{"role": "user", "content": recipe.format(i, i + 1)}]} for i in range(40)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong.write_text('{"answer": 1}\nno json\n')
    done = launch_here("drift", str(run), str(other), "--likelihood")
    require_exit(done, 3)
    assert done.stdout.startswith("The prompts have drifted: different words (p = ")
    assert f"{other}:" in done.stdout
    assert "model.path=run:tuned" in done.stdout
    again = launch_here("drift", str(run), str(other), "--likelihood", "--json")
    assert "training prompts:" in done.stderr
    assert "training prompts:" not in again.stderr, "the scores are stored"
    shown = json.loads(again.stdout)
    assert shown["sentence"] == done.stdout.splitlines()[0]
    assert shown["num_prompts"] == 40
    words, lengths, base, tuned = shown["measures"]
    assert base == {**tuned, "name": base["name"], "title": base["title"]}, "the base model against itself"
    assert base["now"] == pytest.approx(median_prompt_loss(run, rows), abs=1e-4)
    quick = json.loads(launch_here("drift", str(run), str(other), "--json").stdout)
    assert quick["measures"] == [words, lengths]
    refused = launch_here("drift", str(run), str(wrong))
    assert refused.returncode == 2
    assert f"{wrong}:1" in refused.stderr
