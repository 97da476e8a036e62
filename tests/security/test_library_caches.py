"""Library caches stay in this user's folders, whatever other users create in the temporary folder."""

from __future__ import annotations

import getpass
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import hand_made
import pytest
from file_owners import MALLORY, TEAM, as_root, give
from huggingface_hub.utils import _http

from launcher import json_records
from launcher.cli.worker_process import worker_environment
from launcher.config.schema import RunConfig
from launcher.evaluate.task import EvaluationFolder, EvaluationTask, Weights
from launcher.security import library_caches
from launcher.security.hub_answers import guard_hub_client
from launcher.worker.doctor.python_process import run_python
from launcher.worker.evaluation import node
from launcher.worker.ray import evaluation

__all__ = ["as_root"]


def find_usable_caches(environ: Mapping[str, str], *alert: Callable[[str], None]) -> dict[str, str]:
    """Return the variables that name folders."""
    variables = library_caches.find_usable_caches(environ, *alert)
    assert variables.items() >= TURNED_OFF.items()
    return {name: value for name, value in variables.items() if name not in TURNED_OFF}


ALL = {
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_MODULES_CACHE", "HF_XET_CACHE"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
}
# By default, libraries place these caches in the temporary folder.
TEMPORARY = {"TORCHINDUCTOR_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"}
# These turn off caches of torch that are in the temporary folder under any settings.
TURNED_OFF = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_ENABLE_CACHING_MODULE": "0"}
# An interpreter that records where torch and a kernel compiler would look for compiled code, and which other caches torch uses.
INTERPRETER = """#!/bin/sh
exec {python} -c "
import os
from torch._inductor import config
from torch._inductor.runtime import cache_dir_utils
folders = cache_dir_utils.cache_dir(), os.environ['QUACK_CACHE_DIR']
print(*folders, config.cpp_cache_precompile_headers, sep=chr(10), file=open('{note}', 'w'))"
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A home directory that nobody can write to, not even root."""
    file = tmp_path / "home"
    file.write_text("no folder")
    return file


def test_only_compiled_code_moves_where_the_home_directory_can_be_written(tmp_path: Path) -> None:
    caches = find_usable_caches({"HOME": str(tmp_path)})
    assert caches.keys() == TEMPORARY
    assert {Path(path).parent for path in caches.values()} == {tmp_path / ".cache"}


def test_the_default_that_torch_sets_is_nobodys_choice(tmp_path: Path, temporary: Path) -> None:
    default = str(temporary / f"torchinductor_{getpass.getuser()}")
    caches = find_usable_caches({"HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": default})
    assert caches["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache/torchinductor")
    assert "TORCHINDUCTOR_CACHE_DIR" not in find_usable_caches({"HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "/mine"})


def test_caches_leave_a_home_directory_that_cannot_be_written(closed: Path, temporary: Path) -> None:
    caches = find_usable_caches({"HOME": str(closed)})
    assert caches.keys() == ALL | TEMPORARY
    (folder,) = {Path(path).parent for path in caches.values()}
    assert folder.parent == temporary
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert find_usable_caches({"HOME": str(closed)}) == caches, "a later attempt finds what was compiled"


def test_a_folder_that_is_set_is_left_alone(closed: Path, tmp_path: Path) -> None:
    environ = {"HOME": str(closed), "TORCH_EXTENSIONS_DIR": "/mine", "XDG_CACHE_HOME": str(tmp_path)}
    in_cache_home = {"WANDB_CACHE_DIR", "HF_MODULES_CACHE", "HF_XET_CACHE"}
    assert find_usable_caches(environ).keys() == (ALL | TEMPORARY) - {"TORCH_EXTENSIONS_DIR", *in_cache_home}


@pytest.mark.parametrize("mode", [0o777, 0o750])
def test_a_folder_that_others_can_enter_is_not_used(closed: Path, temporary: Path, mode: int) -> None:
    """Another user could have placed code there that the ranks would load."""
    theirs = temporary / f"launcher-caches-{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(mode)
    assert not any(path.startswith(f"{theirs}/") for path in find_usable_caches({"HOME": str(closed)}).values())


def test_folders_of_compiled_code_that_others_could_have_written_are_replaced(
    tmp_path: Path, temporary: Path, as_root: None
) -> None:
    """Some are named by the cache's own variable, others by XDG_CACHE_HOME, the variable for a parent folder."""
    # pytest's folders are inside private ones.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        shared = Path(name)
        for folder in ("torch_extensions", "inductor", "own", "quack"):
            (shared / folder).mkdir()
        for folder in ("torch_extensions", "inductor"):
            give(shared / folder)
        (shared / "quack").chmod(0o777)
        shared.chmod(0o1777)
        named = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "own", "QUACK_CACHE_DIR": "quack"}
        environ = {"HOME": str(tmp_path), "XDG_CACHE_HOME": name, **{key: f"{name}/{value}" for key, value in named.items()}}
        alerts = list[str]()
        caches = find_usable_caches(environ, alerts.append)
        names = {"TORCH_EXTENSIONS_DIR", "HF_MODULES_CACHE", "HF_XET_CACHE", "WANDB_CACHE_DIR", *(TEMPORARY)}
        assert caches.keys() == names, "the others are this user's"
        assert {Path(path).parent for path in caches.values()} == {library_caches.node_cache_root()}
        assert library_caches.node_cache_root().parent == temporary
        replaced = "; a private folder is used instead; to use yours: "
        assert f"TORCH_EXTENSIONS_DIR: {name}/torch_extensions belongs to {MALLORY}{replaced}" in alerts[0]
        same = "HF_MODULES_CACHE, HF_XET_CACHE, WANDB_CACHE_DIR, CUTE_DSL_CACHE_DIR, FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
        assert any(text.startswith(f"{same}: {name} can be written") for text in alerts), "one alert for each reason"
        assert len(alerts) == len(names) - 4
        assert find_usable_caches({**environ, "LAUNCHER_TRUST_OWNERS": "anyone"}).keys() == TEMPORARY - named.keys()


def test_the_umask_does_not_open_the_folder_of_torch_to_others(tmp_path: Path, as_root: None) -> None:
    """With umask 002, a user whose group is not their own would get an alert in every run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home = Path(name)
        os.chown(home, -1, TEAM)
        home.chmod(0o2755)
        alerts, mask = list[str](), os.umask(0o002)
        try:
            caches = find_usable_caches({"HOME": name}, alerts.append)
            Path(caches["TORCHINDUCTOR_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(mask)
        assert caches["TORCHINDUCTOR_CACHE_DIR"] == str(home / ".cache/torchinductor")
        assert find_usable_caches({"HOME": name}, alerts.append) == caches
        assert alerts == []


@pytest.mark.parametrize(
    "variable, made",
    [
        ("TRITON_CACHE_DIR", ".triton/cache/HASH"),
        ("TORCH_EXTENSIONS_DIR", ".cache/torch_extensions/py311_cpu/cpu_adam/cpu_adam.so"),
        ("WANDB_CACHE_DIR", ".cache/wandb/artifacts/obj"),
        ("HF_XET_CACHE", ".cache/huggingface/xet/logs"),
    ],
)
def test_what_other_programs_make_in_a_cache_of_the_launcher_is_checked_too(variable: str, made: str, as_root: None) -> None:
    """The launcher closes its umask, so the cache itself does not show that what is in it was made with umask 002."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home, folder = Path(name), Path(name, made)
        home.chmod(0o755)
        environ = {"HOME": name}
        cache = library_caches.cache_folders(environ)[variable]
        for one in reversed([folder, *folder.parents][: len(Path(made).parts)]):
            one.touch(0o644) if one.suffix == ".so" else one.mkdir(mode=0o755)
        assert variable not in find_usable_caches(environ)
        os.chown(folder, -1, TEAM)
        folder.chmod(0o775)
        alerts = list[str]()
        assert Path(find_usable_caches(environ, alerts.append)[variable]).parent == library_caches.node_cache_root()
        assert len(alerts) == 1
        assert f"{folder.relative_to(cache)} can be written by the group" in alerts[0]
        assert f"chmod g-w -R {cache};" in alerts[0]
        # In a folder that only this user can enter, anything may have any mode.
        cache.chmod(0o700)
        assert variable not in find_usable_caches(environ)


def test_a_folder_with_a_known_name_is_used_only_if_this_user_made_it(as_root: None) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o1777)
        folder = Path(name, "torchinductor_me")
        assert library_caches.is_own_folder(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "precompiled_headers").mkdir()
        assert library_caches.is_own_folder(folder)
        folder.chmod(0o755)
        (folder / "precompiled_headers/one.h").touch()
        (folder / "precompiled_headers/one.h").chmod(0o666)
        assert not library_caches.is_own_folder(folder)
        (folder / "precompiled_headers/one.h").chmod(0o644)
        assert library_caches.is_own_folder(folder)
        os.chown(folder, MALLORY, -1)
        assert not library_caches.is_own_folder(folder)


def test_an_upload_is_not_described_in_a_folder_of_others(tmp_path: Path, as_root: None) -> None:
    """Whoever can write to Xet's folder can exchange what a push registers as the content of the model's files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        (Path(name) / "xet").mkdir()
        Path(name).chmod(0o1777)
        environ = {"HOME": str(tmp_path), "HF_HOME": name}
        assert "HF_XET_CACHE" not in find_usable_caches(environ)
        give(Path(name) / "xet")
        assert Path(find_usable_caches(environ)["HF_XET_CACHE"]).parent == library_caches.node_cache_root()


def test_logs_and_tables_of_wandb_are_not_kept_in_a_folder_of_others(tmp_path: Path, as_root: None) -> None:
    """It appends to logs that are named after the second of its start, and opens a table twice; both follow links."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        environ = {"HOME": str(tmp_path), "WANDB_DATA_DIR": name, "WANDB_CACHE_DIR": name, "WANDB_CONFIG_DIR": name}
        assert find_usable_caches(environ).keys() == TEMPORARY
        give(Path(name))
        caches, alerts = find_usable_caches(environ), list[str]()
        replaced = caches.keys() - TEMPORARY
        assert replaced == {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"}, "another WANDB_CONFIG_DIR could name another server"
        assert {Path(caches[variable]).parent for variable in replaced} == {library_caches.node_cache_root()}
        assert find_usable_caches(environ | caches, alerts.append).keys() <= TEMPORARY
        assert alerts == []


def test_a_command_writes_no_logs_of_xet_into_a_folder_of_others(monkeypatch: pytest.MonkeyPatch, as_root: None) -> None:
    """Their names contain the time and the process, so others can put links there first; `plan` downloads a README itself."""
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http._GLOBAL_CLIENT_FACTORY)
    monkeypatch.setenv("HF_XET_CACHE", "")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        (Path(name) / "xet/logs").mkdir(parents=True)
        Path(name).chmod(0o1777)
        monkeypatch.setenv("HF_HOME", name)
        guard_hub_client.__wrapped__()
        assert os.environ["HF_XET_CACHE"] == ""
        give(Path(name) / "xet")
        guard_hub_client.__wrapped__()
        assert Path(os.environ["HF_XET_CACHE"]).parent == library_caches.node_cache_root()


@pytest.fixture
def note(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, as_root: None) -> Path:
    """Let another user own the folders of compiled code; sys.executable records the folders it would use in this file."""
    for name in (f"torchinductor_{getpass.getuser()}", getpass.getuser()):
        (temporary / name).mkdir()
        (temporary / name).chmod(0o777)
        os.chown(temporary / name, MALLORY, MALLORY)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in (*TEMPORARY, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    file, python = tmp_path / "note", tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable, note=file))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return file


@pytest.mark.rest
@pytest.mark.parametrize("kind", ["worker of a command", "node of an evaluation", "task of Ray"])
def test_compiled_code_of_another_user_is_not_loaded(note: Path, tmp_path: Path, kind: str) -> None:
    if kind == "worker of a command":
        subprocess.run([sys.executable], env=worker_environment(), check=True)
    elif kind == "node of an evaluation":
        folder = EvaluationFolder(tmp_path)
        config = RunConfig.model_validate(hand_made.SETTINGS).model_dump(mode="json")
        weights = Weights("", "", ())
        json_records.write(folder.task, EvaluationTask("run", 3, config, (), None, weights, "", None, 1, (), 0, {}))
        assert node.run_node(str(tmp_path), 0, 1, 0) == 0
    else:
        assert evaluation.answer_here(str(tmp_path), 0, 1, 0) == 0
    cache = tmp_path / "home/.cache"
    # Kernels contain torch's precompiled headers, which are in torchinductor_USER whatever the variables say.
    assert note.read_text().split() == [str(cache / "torchinductor"), str(cache / "quack_cache"), "False"]


def test_a_check_of_a_node_loads_no_compiled_code_of_others(tmp_path: Path, temporary: Path, as_root: None) -> None:
    """Slurm and Ray start node checks with the node's environment."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        give(Path(name))
        environ = {**os.environ, "HOME": str(tmp_path), "TRITON_CACHE_DIR": name}
        finished = run_python(["-c", "import os; print(os.environ['TRITON_CACHE_DIR'])"], 120, environ)
    assert finished.output.strip().startswith(f"{temporary}/launcher-caches-")
