"""The environment of vLLM's interpreter: who could have changed what it imports, found without running it.

Python takes the folder of pyvenv.cfg from the path by which the interpreter is started, and the folders of its modules from there
or, where there is none, from the file that links lead to: https://docs.python.org/3/library/sys_path_init.html
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
# In a prefix. Debian keeps packages of the administrator in the last one.
_LIBRARIES = ("lib", "lib64", "local/lib")
# Lines of a .pth file that name no folder: Python runs the others as code.
_NO_FOLDERS = ("#", "import ", "import\t")


def require_own_environment(python: Path) -> None:
    """Check the interpreter and its packages: a relative path may lead to somebody else's, and each node may have another one.

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
    # Whoever can make one names the folder of the modules.
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
    """Return the paths of an interpreter: the one given, and those that links lead to one after the other."""
    paths = [python]
    while paths[-1].is_symlink() and len(paths) <= MAX_LINKS:
        target = paths[-1].parent / os.readlink(paths[-1])
        # The folder above a folder that is a link is that of its target.
        paths.append(target.parent.resolve() / target.name)
    return paths


def _read_settings(file: Path) -> dict[str, str]:
    lines = list[str]()
    with suppress(OSError):
        lines = file.read_text(errors="replace").splitlines()
    pairs = (line.partition("=") for line in lines)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _content(library: Path, with_packages: bool) -> Iterator[Path]:
    """Yield the standard libraries of all versions in a folder, and their packages."""
    for version in library.glob("python3*"):
        yield version
        for path in version.iterdir() if version.is_dir() else ():
            if with_packages or path.name not in _PACKAGES:
                yield path
                yield from tree(path)


def _problems_of_named(library: Path) -> Iterator[Problem]:
    """Yield the problems of what .pth files add to the search path, as packages that are installed for editing do."""
    for file in (file for name in _PACKAGES for file in library.glob(f"python3*/{name}/*.pth")):
        lines = list[str]()
        with suppress(OSError):
            lines = file.read_text(errors="replace").splitlines()
        for line in lines:
            if line.strip() and not line.startswith(_NO_FOLDERS):
                path = file.parent / line.rstrip()
                yield from filter(None, [ownership.folder_problem(_SUBJECT, path, _modules(path, library))])


def _modules(folder: Path, checked: Path) -> Iterator[Path]:
    """Yield the modules below a folder with the folders around them, apart from the library that is checked.

    Such a folder may be a whole project: its data may belong to others, as far as no module lies beside them.
    """
    yielded = {folder}
    for parent, folders, files in os.walk(folder):
        # No name of a module begins with a dot.
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != checked]
        links = [path for name in folders if (path := Path(parent, name)).is_symlink() and (path / "__init__.py").is_file()]
        modules = [*links, *(Path(parent, name) for name in files if name.endswith(_MODULES))]
        around = [above for above in (Path(parent), *Path(parent).parents) if above.is_relative_to(folder)] if modules else []
        yield from (path for path in (*around, *modules) if path not in yielded)
        yielded.update(around)
