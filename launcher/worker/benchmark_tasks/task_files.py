"""The files of lm-evaluation-harness tasks: who could have written them, and whether they run a model's answers."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import ConfigError, Problem
from launcher.security import ownership
from launcher.security.permissions import tree

# The option for the folder of the user's own tasks.
TASK_FOLDER = "--task-folder"
_SUBJECT = "a task"
# Calls that run a string as code or as a command; sympy evaluates what it parses.
_RUN_BY_NAME = frozenset({"eval", "exec", "compile"})
_RUN_BY_ATTRIBUTE = frozenset({"system", "popen", "Popen", "check_output", "check_call", "parse_expr", "sympify"})
_RUN_OF_SUBPROCESS = frozenset({"run", "call"})
# The `evaluate` metric that runs answers.
_RUNNING_METRIC = "code_eval"
# With it, transformers runs the code of a model that a task's settings name.
_TRUST = "trust_remote_code"


def folder_problems(folder: Path) -> list[Problem]:
    """Return the files that other users could have written, in a task folder or included by its tasks from elsewhere.

    All these files can run code: a task names functions, and its templates are not sandboxed. A file that does not exist counts
    too, because the harness looks for it again.
    """
    first = ownership.folder_problem(_SUBJECT, folder, tree(folder))
    problems, seen = [] if first is None else [first], set[Path]()
    named = dict.fromkeys(path for file in sorted(folder.rglob("*.yaml")) for path in _named_files(file, seen))
    outside = (path for path in named if not path.resolve().is_relative_to(folder.resolve()))
    return [*problems, *(problem for path in outside if (problem := _outside_problem(path)))]


def _outside_problem(path: Path) -> Problem | None:
    if (problem := ownership.file_problem(_SUBJECT, path)) is not None or path.suffix != ".py":
        return problem
    # Python runs the cached bytecode instead of the source.
    return ownership.file_problem(_SUBJECT, Path(importlib.util.cache_from_source(str(path.resolve()))))


def _named_files(link: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the YAML files that a task includes, and the Python files of the functions that it names. They may not exist.

    If `link` is a link, the harness looks for them beside the file it leads to. `seen` holds files that were already examined.
    """
    functions: list[str] = []
    try:
        file = link.resolve()
        if file in seen:
            return
        seen.add(file)
        values = yaml.load(file.read_bytes(), Loader=_loader(functions))  # noqa: S506
    except (OSError, ValueError, RuntimeError, yaml.YAMLError):
        # The harness cannot read this file either.
        return
    yield from (file.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in functions)
    includes = values.get("include") if isinstance(values, dict) else None
    for include in includes if isinstance(includes, list) else [includes]:
        if isinstance(include, str):
            yield file.parent / include
            yield from _named_files(file.parent / include, seen)


def _loader(functions: list[str]) -> type[yaml.SafeLoader]:
    """Return a YAML loader that appends the names of functions to a list."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: functions.append(str(node.value)))
    return Loader


def require_own(folder: Path) -> None:
    """Reject a task folder that is missing or that other users could have written.

    Raises:
        ConfigError: with every file and folder that other users could have written.
    """
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=TASK_FOLDER, value=str(folder))
    if problems := folder_problems(folder):
        raise ConfigError(problems)


def find_running_call(task: Any) -> str | None:
    """Return the file, line and name of a call with which a task's code could run an answer or a model's code.

    None if it has none.
    """
    files = dict.fromkeys(file for function in _functions(task) if (file := _source_file(function)) is not None)
    pending, seen = list(files), set(files)
    while pending:
        call, imported = _scan(file := pending.pop(0))
        if call is not None:
            return f"{file}:{call}"
        pending += [path for path in imported if path not in seen]
        seen.update(imported)
    return None


def _functions(task: Any) -> Iterator[Callable[..., Any]]:
    """Yield the class of a task, if it is a Python task, and the functions that its settings name."""
    from lm_eval.api.task import ConfigurableTask

    if type(task) is not ConfigurableTask:
        yield type(task)
    settings = task.config
    pending = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
    while pending:
        value = pending.pop()
        if isinstance(value, functools.partial):
            pending.append(value.func)
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            pending += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif callable(value):
            yield value


def _source_file(function: Callable[..., Any]) -> Path | None:
    """Return the file of a task's function, or None for functions of the harness and other packages."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve()
    except (TypeError, OSError, ValueError):
        return None
    if file.is_relative_to(_packaged_tasks()):
        return file
    libraries = (_packaged_tasks().parent, Path(sysconfig.get_path("stdlib")).resolve())
    is_of_library = "site-packages" in file.parts or any(file.is_relative_to(library) for library in libraries)
    return None if is_of_library or not file.is_file() else file


@functools.cache
def _packaged_tasks() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).resolve().parent


@functools.cache
def _scan(file: Path) -> tuple[str | None, tuple[Path, ...]]:
    """Return the line and name of the first call that could run a string, and the task files that a file imports."""
    try:
        parsed = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None, ()
    names = list[str]()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and (called := _running_name(node)) is not None:
            return f"{node.lineno} calls {called}", ()
        if isinstance(node, ast.Name) and node.id in _RUN_BY_ATTRIBUTE:
            return f"{node.lineno} uses {node.id}", ()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names] + [node.module or ""]
    return None, tuple(dict.fromkeys(path for name in names for path in _imported(file, name)))


def _running_name(call: ast.Call) -> str | None:
    function = call.func
    if any(keyword.arg == _TRUST and not _is_false(keyword.value) for keyword in call.keywords):
        return f"{ast.unparse(function)} with {_TRUST}"
    if isinstance(function, ast.Name):
        return function.id if function.id in _RUN_BY_NAME | _RUN_BY_ATTRIBUTE else None
    if not isinstance(function, ast.Attribute):
        return None
    is_of_subprocess = isinstance(function.value, ast.Name) and function.value.id == "subprocess"
    if function.attr in _RUN_BY_ATTRIBUTE or (is_of_subprocess and function.attr in _RUN_OF_SUBPROCESS):
        return function.attr
    loads_metric = any(isinstance(argument, ast.Constant) and argument.value == _RUNNING_METRIC for argument in call.args)
    return _RUNNING_METRIC if function.attr == "load" and loads_metric else None


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def _imported(file: Path, name: str) -> Iterator[Path]:
    """Yield the files, beside this one or in packaged tasks, that an import of this name could refer to."""
    parts = [part for part in name.split(".") if part]
    packaged = _packaged_tasks()
    candidates = [file.parent / f"{part}.py" for part in parts]
    if parts[:2] == ["lm_eval", "tasks"]:
        candidates.append(packaged.joinpath(*parts[2:]).with_suffix(".py"))
    yield from (path for path in candidates if path != file and path.is_file())
