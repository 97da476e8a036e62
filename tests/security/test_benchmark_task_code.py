"""Tasks of lm-evaluation-harness use only trusted rows and code, and the evaluated model cannot run code of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest
from file_owners import MALLORY, as_root, give
from pace import slowness
from plan_fixtures import config_of

from launcher.config.schema import RunConfig
from launcher.data.tokenization import render_limits
from launcher.errors import ConfigError, DataError
from launcher.models import private_code, remote_code
from launcher.worker.benchmark_tasks import harness, library_caches, score, task_files
from launcher.worker.benchmark_tasks.harness import Harness
from launcher.worker.benchmark_tasks.request import BenchmarkFolder, BenchmarkRequest
from launcher.worker.benchmark_tasks.task_files import find_running_call

__all__ = ["as_root", "config_of"]

DEADLINE_S = 300
# `evaluate` adds the folder around the metrics to the search path when it loads a metric.
SCORES = """
import contextlib, evaluate
bleu = evaluate.load('bleu')
with contextlib.suppress(ImportError):
    import planted
def process(doc, results): return {}
"""
CONFIG_CODE = """
from transformers import LlamaConfig
open({marker!r}, "w")
class C(LlamaConfig):
    model_type = "mine"
"""
# Prints the questions of the task `rows`, and the error messages if the task `metric` cannot be loaded.
SCRIPT = """
import json, os, sys
from pathlib import Path
from launcher.errors import LauncherError
from launcher.security.folders import private_files
from launcher.worker.benchmark_tasks.harness import Harness

with private_files():
    harness, problems = Harness(Path(sys.argv[1]), Path(sys.argv[2])), []
    harness.find(["rows"])
    (task,) = harness._manager.load(["rows"])["tasks"].values()
    try:
        harness.find(["metric"])
    except LauncherError as error:
        problems = [str(problem) for problem in error.problems]
print(json.dumps({"questions": [row["question"] for row in task.test_docs()], "problems": problems}))
"""


def use_tasks(tmp_path: Path, env: Mapping[str, str]) -> dict[str, list[str]]:
    command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "caches"), str(tmp_path / "tasks")]
    variables = {**env, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=DEADLINE_S * slowness())
    assert done.returncode == 0, done.stderr
    printed: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task that reads rows and a task that loads the metric bleu, as packaged tasks do."""
    folder = tmp_path / "tasks"
    folder.mkdir(mode=0o700)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"question": f"Secret {i}?", "answer": "a"}) + "\n" for i in range(3)))
    task = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    (folder / "rows.yaml").write_text(f"task: rows\n{task}metric_list: [{{metric: exact_match}}]\n")
    (folder / "metric.yaml").write_text(f"task: metric\n{task}process_results: !function scores.process\n")
    (folder / "scores.py").write_text(SCORES)
    return folder


@pytest.mark.rest
@pytest.mark.usefixtures("as_root", "tasks")
def test_a_cache_of_others_gives_a_task_neither_rows_nor_code(tmp_path: Path, launcher_env: Mapping[str, str]) -> None:
    pytest.importorskip("lm_eval")
    home = tmp_path / "hf"
    module = home / "modules/evaluate_modules/metrics/evaluate-metric--bleu" / ("a" * 64)
    module.mkdir(parents=True)
    for folder in (module, *module.parents[:3]):
        (folder / "__init__.py").touch()
    (module / "bleu.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    planted = home / "modules/planted.py"
    planted.write_text(f"open({str(tmp_path / 'planted')!r}, 'w')")
    give(planted)
    (home / "modules").chmod(0o1777)
    assert use_tasks(tmp_path, launcher_env)["questions"] == ["Secret 0?", "Secret 1?", "Secret 2?"]
    (tmp_path / "ran").unlink()
    assert not (tmp_path / "planted").exists(), "of this user's folder of modules, the metrics alone are used"
    assert not (tmp_path / "caches").exists()
    (written,) = (path for path in home.rglob("*.arrow"))
    opened = [path for path in (written, *written.parents) if path.is_relative_to(home / "datasets")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in opened), "the rows are private"

    written.write_bytes(written.read_bytes().replace(b"Secret", b"Forged"))
    give(home)
    printed = use_tasks(tmp_path, launcher_env)
    assert printed["questions"] == ["Secret 0?", "Secret 1?", "Secret 2?"]
    assert any(f"HF_MODULES_CACHE names is not trusted: {home} belongs to {MALLORY}" in text for text in printed["problems"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("as_root")
def test_caches_that_others_could_have_written_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home/hf"
    (home / "datasets/rows").mkdir(parents=True)
    for variable in library_caches._CACHES:
        monkeypatch.setenv(variable, str(home / "datasets"))

    def replaced() -> list[str]:
        monkeypatch.setenv("HF_MODULES_CACHE", str(home / "datasets"))
        problems = library_caches.leave_caches_of_others(tmp_path / "caches")
        return [problem.message for problem in problems]

    (home / "datasets").chmod(0o777)
    (tmp_path / "home").chmod(0o700)
    assert replaced() == [], "nobody else enters the folder above"
    give(home / "datasets/rows")
    # Metric modules are in a subfolder of HF_MODULES_CACHE.
    names = ("HF_DATASETS_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE")
    assert replaced() == [f"what {name} names is not trusted: rows belongs to {MALLORY}" for name in names]
    assert [os.environ[name] for name in names] == [f"{tmp_path}/caches/{name}" for name in ("datasets", "evaluate", "metrics")]
    assert replaced() == [], "of the folders in their place"
    give(tmp_path / "home")
    assert replaced() == [f"what HF_MODULES_CACHE names is not trusted: {tmp_path}/home belongs to {MALLORY}"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everyone can reach; pytest's folders are inside private ones."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_cache_that_others_can_make_first_is_replaced(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems() -> list[str]:
        for variable in (*library_caches._CACHES, "HF_MODULES_CACHE"):
            monkeypatch.setenv(variable, str(shared / "cache"))
        return [problem.message for problem in library_caches.leave_caches_of_others(tmp_path / "caches")]

    assert problems() == []
    shared.chmod(0o1777)
    names = (*library_caches._CACHES, "HF_MODULES_CACHE")
    assert problems() == [f"what {name} names is not trusted: {shared} can be written by everyone" for name in names]


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    "attempt",
    [
        lambda tasks, others: (tasks / "below").symlink_to(others),
        lambda tasks, others: (tasks / "task.yaml").write_text(f"include: [{others}/base.yaml]\n"),
        lambda tasks, others: (tasks / "task.yaml").write_text("include: '../common/base.yaml'\n"),
        lambda tasks, others: (tasks / "task.yaml").write_text(f"x: !function {others}/utils.process\n"),
        lambda tasks, others: (
            (tasks / "task.yaml").write_text("include: first"),
            (tasks / "first").write_text(f"include: {others}/base.yaml"),
        ),
        lambda tasks, others: (
            (others / "mine").write_text("include: base.yaml"),
            (tasks / "task.yaml").symlink_to(others / "mine"),
        ),
        lambda tasks, others: (
            (others / "mine").write_text("x: !function utils.process"),
            (tasks / "task.yaml").symlink_to(others / "mine"),
        ),
    ],
    ids=[
        "link",
        "absolute include",
        "relative include",
        "function",
        "include of an include",
        "include by a link",
        "function by a link",
    ],
)
def test_a_task_does_not_lead_to_files_of_another_user(tmp_path: Path, attempt: Callable[[Path, Path], object]) -> None:
    tasks, others = tmp_path / "tasks", tmp_path / "common"
    for folder in (tasks, others):
        folder.mkdir()
    (others / "base.yaml").write_text("task: base\nx: !function utils.process\n")
    (others / "utils.py").write_text("")
    attempt(tasks, others)
    task_files.require_own(tasks)
    give(others / "base.yaml")
    give(others / "utils.py")
    with pytest.raises(ConfigError, match=rf"a task is not trusted: .* belongs to {MALLORY}"):
        task_files.require_own(tasks)


@pytest.mark.usefixtures("as_root")
def test_a_task_leads_to_no_file_that_others_can_make(tmp_path: Path) -> None:
    """The harness first searches for a function next to its task's file, where Python also searches for bytecode."""
    tasks, shared = tmp_path / "tasks", tmp_path / "shared"
    for folder in (tasks, shared):
        folder.mkdir()
    (tasks / "task.yaml").write_text(f"include: {shared}/own.yaml")
    for function in ("transformers.AutoConfig", "utils.process"):
        (shared / "utils.py").write_text("def process(): ...")
        (shared / "own.yaml").write_text(f"x: !function {function}")
        shared.chmod(0o755)
        task_files.require_own(tasks)
        shared.chmod(0o1777)
        with pytest.raises(ConfigError, match=f"a task is not trusted: {shared} can be written by everyone"):
            task_files.require_own(tasks)
    (shared / "own.yaml").write_text("task: own")
    task_files.require_own(tasks)
    # The harness does not expand `~` either.
    (tasks / "task.yaml").write_text("include: ~/base.yaml")
    assert list(task_files._named_files(tasks / "task.yaml", set())) == [tasks / "~/base.yaml"]


@pytest.mark.usefixtures("as_root")
def test_tasks_are_checked_again_before_they_are_scored(tmp_path: Path, config_of: Callable[..., RunConfig]) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    request = BenchmarkRequest(config_of(), 1, ("own",), tasks, None, {}, "", None, 1, "")
    give(tasks)
    with pytest.raises(ConfigError, match=f"a task is not trusted: .* belongs to {MALLORY}"):
        score.score(BenchmarkFolder(tmp_path), cast(Harness, None), request)


def test_a_task_runs_no_code_of_a_model_that_its_settings_name(tmp_path: Path) -> None:
    """Packaged tasks that run a model's code are refused. A task that hides such a call fails before the code is imported."""
    pytest.importorskip("lm_eval")
    from transformers import AutoConfig

    for name in ("ruler", "babilong"):
        call, _ = task_files._scan(task_files._packaged_tasks() / name / "common_utils.py")
        assert (call or "").endswith("calls AutoTokenizer.from_pretrained with trust_remote_code")
    own = tmp_path / "own.py"
    own.write_text("AutoTokenizer.from_pretrained('gpt2', trust_remote_code=False)")
    assert task_files._scan(own) == (None, ())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}}))
    (tmp_path / "code.py").write_text(CONFIG_CODE.format(marker=str(tmp_path / "ran")))
    with harness._no_code_of_models(), pytest.raises(ConfigError, match="a task loads a model or tokenizer with code of its own"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    copy = private_code.folder_to_load(tmp_path, True, remote_code.code_digest(tmp_path))
    AutoConfig.from_pretrained(copy, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_tasks_whose_code_could_run_an_answer_are_known(tmp_path: Path) -> None:
    """Some tasks declare it; others, such as math graders, use a parser that evaluates its input."""
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from lm_eval.config.task import TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.ifeval import utils as ifeval
    from lm_eval.tasks.score.math import utils_math

    def call_of(function: Callable[..., object]) -> str | None:
        return find_running_call(SimpleNamespace(config=TaskConfig(task="x", process_results=function)))

    assert "math_grader.py:" in (call_of(utils_math.process_results) or "")
    assert call_of(ifeval.process_results) is None
    (tmp_path / "own.yaml").write_text("x: !function grade.process\n")
    (tmp_path / "helper.py").write_text("def run(text):\n    return eval(text)\n")
    (tmp_path / "grade.py").write_text("def process(doc, results):\n    import helper\n    return helper.run(results[0])\n")
    own = load_yaml(tmp_path / "own.yaml")["x"]
    assert call_of(own) == f"{tmp_path}/helper.py:2 calls eval"
    problem = harness._unsafe_problem("own", SimpleNamespace(config=TaskConfig(task="own", process_results=own)))
    assert problem is not None
    assert problem.value == "own"


def test_a_chat_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setattr(render_limits, "MAX_CPU_S", 0.5)
    config = LlamaConfig(vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{{{ messages[0].content }}}}{{% if add_generation_prompt %}}{loop}{{% endif %}}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>", chat_template=template
    )
    model = harness.make_model(LlamaForCausalLM(config), tokenizer, 1, 16)
    messages = [{"role": "user", "content": "a"}]
    assert model.apply_chat_template(messages, add_generation_prompt=False) == "a"
    with pytest.raises(DataError, match=r"the chat template takes more than 0\.5 s for one conversation"):
        model.apply_chat_template(messages)
