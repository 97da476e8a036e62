"""Import directions are kept, the submit side does not load torch, and only a backend's own files know the backend."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import require_exit

from launcher.clusters.backends import BACKENDS
from launcher.config.schema import SECTIONS

REPO = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "ray", "wandb")


def modules(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((REPO / "launcher" / folder).glob("*.py"))]
    return [".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for file in files]


SUBMIT_SIDE = [
    *modules("cli", "cli/render"),
    *modules("config", "config/sections", "plan", "clusters"),
    *(
        "launcher.errors",
        "launcher.facts",
        "launcher.models.found_model",
        "launcher.models.parent_run",
        "launcher.models.weight_files",
        "launcher.runs.run_store",
    ),
    *("launcher.runs.locks", "launcher.hardware"),
    *("launcher.data.cache_store", "launcher.data.split", "launcher.data.sources"),
    *("launcher.checkpoint.store", "launcher.checkpoint.manifest"),
]


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120)
    require_exit(done)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_submit_side_loads_nothing_heavy() -> None:
    assert len(SUBMIT_SIDE) > 20
    loaded = loaded_after(f"import {', '.join(SUBMIT_SIDE)}")
    assert "launcher" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_worker_side_loads_torch() -> None:
    assert "torch" in loaded_after("import launcher.train.model")


def test_using_a_backend_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "from launcher.clusters.backends import cluster_for\ncluster_for('local')\nfrom launcher.hardware import device\ndevice()"
    )
    assert loaded.isdisjoint(HEAVY)


def test_the_data_build_loads_no_torch() -> None:
    """Each worker process of the data build imports the main module again."""
    loaded = loaded_after("import launcher.worker.prepare")
    assert "transformers" in loaded
    assert loaded.isdisjoint(set(HEAVY) - {"transformers"})


def test_status_and_ls_do_not_load_pydantic() -> None:
    """Loading pydantic would double the time of `status` and `ls`."""
    backends = "".join(f"\ncluster_for({kind!r})" for kind in ("local", "slurm", "ray", "static"))
    loaded = loaded_after(f"import launcher.cli.status\nfrom launcher.clusters.backends import cluster_for{backends}")
    assert "launcher" in loaded
    assert loaded.isdisjoint(("pydantic", "hydra", "filelock", "asyncio"))


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=REPO, timeout=120)
    require_exit(done)
    assert "4 kept, 0 broken" in done.stdout


def test_the_code_of_a_model_runs_only_by_the_option_that_guards_it() -> None:
    """launcher.models.remote_code.code_option makes transformers refuse all other code in the process."""
    allowing = [
        f"{file.relative_to(REPO)}:{node.lineno}"
        for file in sorted((REPO / "launcher").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if allows_code(node)
    ]
    assert allowing == []


def allows_code(node: ast.AST) -> bool:
    """True for a dict literal, or a call of transformers, with another value than False for the option that allows code."""
    if isinstance(node, ast.Dict):
        pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ):
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    else:
        return False
    return any(
        name == "trust_remote_code" and not (isinstance(value, ast.Constant) and value.value is False) for name, value in pairs
    )


def test_only_a_backends_own_files_compare_the_kind_of_cluster() -> None:
    """Differences between backends belong into methods of `Cluster` or properties of `ClusterSection`."""
    questions = [
        f"{file.relative_to(REPO)}:{node.lineno}"
        for file in sorted((REPO / "launcher").rglob("*.py"))
        if not is_of_one_backend(file)
        for node in ast.walk(ast.parse(file.read_text()))
        if asks_for_the_backend(node)
    ]
    assert questions == []


@pytest.mark.parametrize(
    "code",
    [
        'plan.config.cluster.kind == "slurm"',
        'if cluster.kind in ("local", "ray"): pass',
        'kind != "ray"',
        'match cluster.kind:\n  case "slurm": pass',
        'handlers = {"slurm": one, "local": other}',
        "isinstance(config.cluster, SlurmSection)",
        "isinstance(section, (schema.RaySection, LocalSection))",
        "match section:\n  case SlurmSection(): pass",
    ],
)
def test_comparisons_of_the_kind_are_recognized(code: str) -> None:
    assert any(map(asks_for_the_backend, ast.walk(ast.parse(code))))


def test_both_tables_have_the_same_backends() -> None:
    assert BACKENDS.keys() == SECTIONS.keys()
    assert {kind: section.model_fields["kind"].default for kind, section in SECTIONS.items()} == {kind: kind for kind in SECTIONS}


def is_of_one_backend(file: Path) -> bool:
    """Whether the file is launcher/{clusters,config/sections,worker}/NAME or NAME.py of a backend, or one of the tables."""
    path = file.relative_to(REPO / "launcher").with_suffix("").as_posix()
    if path in ("clusters/backends", "config/schema"):
        return True
    return any(path.startswith((f"clusters/{name}", f"config/sections/{name}", f"worker/{name}")) for name in BACKENDS)


def asks_for_the_backend(node: ast.AST) -> bool:
    """Whether the node compares, matches or maps by a backend's name, or tests for the class of a backend's section."""
    if isinstance(node, ast.Compare):
        return any(names_a_backend(part) for side in (node.left, *node.comparators) for part in ast.walk(side))
    if isinstance(node, ast.MatchValue):
        return names_a_backend(node.value)
    if isinstance(node, ast.Dict):
        return any(key is not None and names_a_backend(key) for key in node.keys)
    if isinstance(node, ast.MatchClass):
        return names_a_section(node.cls)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return any(names_a_section(part) for part in ast.walk(node.args[1]))
    return False


def names_a_backend(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in BACKENDS


def names_a_section(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in {section.__name__ for section in SECTIONS.values()}


def test_a_class_name_has_one_meaning() -> None:
    files: dict[str, list[str]] = {}
    for file in sorted((REPO / "launcher").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                files.setdefault(node.name.lstrip("_"), []).append(file.relative_to(REPO).as_posix())
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}
