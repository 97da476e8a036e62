"""Checks the environment of vLLM's interpreter without running it: who could have changed the files that it imports.

Python finds pyvenv.cfg through the path that the interpreter is started with. It finds the folders of its modules from there or,
if there is none, from the file that links lead to: https://docs.python.org/3/library/sys_path_init.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from launcher.errors import ConfigError, Problem
from launcher.security import ownership
from launcher.security.path_steps import MAX_LINKS
from launcher.security.permissions import tree

_SUBJECT = "the environment of vLLM"
_SETTINGS = "pyvenv.cfg"
_PACKAGES = ("site-packages", "dist-packages")
_MODULES = (".py", ".pyc", ".so")
# Library folders in a prefix. Debian keeps the administrator's packages in the last one.
_LIBRARIES = ("lib", "lib64", "local/lib")
# Lines of a .pth file that name no folder: comments, and lines that Python runs as code.
_NO_FOLDERS = ("#", "import ", "import\t")


def require_own_environment(python: Path) -> None:
    """Check the interpreter and its packages: a relative path may lead to another user's, and each node may have its own.

    Raises:
        ConfigError: with the file or folder, its owner and the remedy.
    """
    if problem := ownership.file_problem("the Python interpreter of vLLM", python):
        raise ConfigError(problem)
    if problem := next(_problems(python), None):
        raise ConfigError(problem)


def _problems(python: Path) -> Iterator[Problem]:
    executables = _links(python)
    settings = [folder / _SETTINGS for file in executables for folder in (file.parent, file.parent.parent)]
    # Whoever can create such a file controls the folder of the modules.
    yield from filter(None, (ownership.file_problem(_SUBJECT, file) for file in settings))
    values = [_read_settings(file) for file in settings]
    homes = [Path(value["home"]) for value in values if value.get("home")]
    # A virtual environment takes only the standard library from elsewhere.
    uses_others = not homes or any(value.get("include-system-site-packages", "").lower() == "true" for value in values)
    prefixes = dict.fromkeys([file.parent.parent for file in executables] + [home.parent for home in homes])
    checked = set[Path]()
    for prefix in prefixes:
        with_packages = uses_others or prefix == python.parent.parent
        for library in (prefix / name for name in _LIBRARIES):
            if library.is_dir() and library.resolve() not in checked:
                checked.add(library.resolve())
                content = _content(library, with_packages)
                yield from filter(None, [ownership.folder_problem(_SUBJECT, library, content)])
                yield from _problems_of_named(library) if with_packages else ()


def _links(python: Path) -> list[Path]:
    """Return the paths of an interpreter: the given path, and the paths that links lead to in turn."""
    paths = [python]
    while paths[-1].is_symlink() and len(paths) <= MAX_LINKS:
        target = paths[-1].parent / os.readlink(paths[-1])
        # If a folder is a link, its parent folder is that of its target.
        paths.append(target.parent.resolve() / target.name)
    return paths


def _read_settings(file: Path) -> dict[str, str]:
    lines = list[str]()
    with suppress(OSError):
        lines = file.read_text(errors="replace").splitlines()
    pairs = (line.partition("=") for line in lines)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _content(library: Path, with_packages: bool) -> Iterator[Path]:
    """Yield the standard libraries of all Python versions in a folder, and their packages."""
    for version in library.glob("python3*"):
        yield version
        for path in version.iterdir() if version.is_dir() else ():
            if with_packages or path.name not in _PACKAGES:
                yield path
                yield from tree(path)


def _problems_of_named(library: Path) -> Iterator[Problem]:
    """Yield the problems of folders that .pth files add to the search path, as editable installs do."""
    for file in (file for name in _PACKAGES for file in library.glob(f"python3*/{name}/*.pth")):
        lines = list[str]()
        with suppress(OSError):
            lines = file.read_text(errors="replace").splitlines()
        for line in lines:
            if line.strip() and not line.startswith(_NO_FOLDERS):
                path = file.parent / line.rstrip()
                yield from filter(None, [ownership.folder_problem(_SUBJECT, path, _modules(path, library))])


def _modules(folder: Path, checked: Path) -> Iterator[Path]:
    """Yield the modules below a folder and the folders around them, excluding the library that is checked already.

    Such a folder may be a whole project: its data may belong to other users, if no module lies in the same folder.
    """
    yielded = {folder}
    for parent, folders, files in os.walk(folder):
        # Module names never begin with a dot.
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != checked]
        links = [path for name in folders if (path := Path(parent, name)).is_symlink() and (path / "__init__.py").is_file()]
        modules = [*links, *(Path(parent, name) for name in files if name.endswith(_MODULES))]
        around = [above for above in (Path(parent), *Path(parent).parents) if above.is_relative_to(folder)] if modules else []
        yield from (path for path in (*around, *modules) if path not in yielded)
        yielded.update(around)
