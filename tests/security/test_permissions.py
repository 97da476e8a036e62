"""Who can write to files and folders: ACLs, groups, and users outside a namespace."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from file_owners import MALLORY, TEAM, as_root
from missing_program import skip_or_fail

from launcher.plan.run_dir import RunDir
from launcher.security import ownership
from launcher.security.folders import make_own_folder
from launcher.security.permissions import tree

__all__ = ["as_root"]

# Tags of ACL entries, from Linux's include/uapi/linux/posix_acl.h.
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 2**32 - 1


@pytest.fixture
def folder(tmp_path: Path, as_root: None) -> Path:
    """A folder for runs, owned by root."""
    path = tmp_path / "runs"
    path.mkdir(mode=0o755)
    return path


def set_acl(path: Path, named: list[tuple[int, int, int]], owning_group: int = 5, mask: int = 7) -> None:
    """Give a file an ACL with entries (tag, permissions, id) for other users and groups."""
    entries = [(OWNER, 7, NO_ID), *named, (OWNING_GROUP, owning_group, NO_ID), (MASK, mask, NO_ID), (OTHER, 5, NO_ID)]
    entries.sort(key=lambda entry: (entry[0], entry[2]))
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            skip_or_fail("the file system of the tests has no ACLs: run pytest with a --basetemp on ext4, xfs or tmpfs")
        raise


@pytest.mark.parametrize(
    ("acl", "trusted", "writers"),
    [
        ({"named": [(USER, 7, MALLORY)]}, "", f"{MALLORY}"),
        ({"named": [(GROUP, 7, TEAM)]}, "", f"the group {TEAM}"),
        ({"named": [(USER, 6, MALLORY), (GROUP, 7, TEAM)]}, "", f"{MALLORY} and the group {TEAM}"),
        ({"named": [(USER, 7, MALLORY), (GROUP, 7, TEAM)]}, f"{MALLORY}", f"the group {TEAM}"),
        ({"named": [(USER, 7, MALLORY), (GROUP, 7, TEAM)]}, f"{MALLORY},group:{TEAM}", ""),
        ({"named": [(USER, 7, MALLORY)], "mask": 5}, "", ""),
        ({"named": [(USER, 5, MALLORY), (GROUP, 5, TEAM)], "owning_group": 7}, "", ""),
        ({"named": [(USER, 7, 0)]}, "", ""),
    ],
)
def test_users_and_groups_that_an_acl_lets_write_are_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, acl: dict[str, object], trusted: str, writers: str
) -> None:
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", trusted)
    set_acl(folder, **acl)  # type: ignore[arg-type]
    problem = ownership.location_problem(RunDir(folder / "demo"))
    if not writers:
        assert problem is None
        return
    assert problem is not None
    assert problem.message.endswith(f": {folder} can be written by {writers}")
    assert problem.value.endswith("mode 0775 and an ACL, which `getfacl` shows")
    folder.chmod(0o755)
    assert ownership.location_problem(RunDir(folder / "demo")) is None, "chmod g-w is a remedy: it changes the mask"


def test_the_owning_group_may_write_only_if_its_own_entry_of_the_acl_says_so(folder: Path) -> None:
    os.chown(folder, -1, TEAM)
    for owning_group, is_accepted in ((5, True), (7, False)):
        set_acl(folder, [(USER, 7, 0)], owning_group)
        assert (ownership.location_problem(RunDir(folder / "demo")) is None) is is_accepted


@pytest.mark.parametrize(
    ("owner", "group", "trusted", "trusted_by"),
    [
        (0, TEAM, f"all members of the group {TEAM}", [f"group:{TEAM}"]),
        (MALLORY, TEAM, f"{MALLORY} and all members of the group {TEAM}", [f"{MALLORY}", f"group:{TEAM}"]),
        # The owner's private group.
        (1, 1, "daemon", ["daemon"]),
    ],
)
def test_the_error_of_a_project_folder_names_all_that_has_to_be_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: int, group: int, trusted: str, trusted_by: list[str]
) -> None:
    os.chown(folder, owner, group)
    folder.chmod(0o2770)
    problem = ownership.location_problem(RunDir(folder / "demo"))
    assert problem is not None
    flags = " ".join(f"--trust-owner {name}" for name in trusted_by)
    remedy = f"if you trust {trusted} with your account, add {flags}, or set LAUNCHER_TRUST_OWNERS={','.join(trusted_by)}"
    assert problem.remedy.startswith(remedy)
    assert problem.remedy.endswith(f"; or run chmod +t {folder}") is (owner == os.geteuid())
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", ",".join(trusted_by))
    assert ownership.location_problem(RunDir(folder / "demo")) is None


def test_the_group_of_all_users_outside_a_namespace_is_nobodys_private_group(
    folder: Path, launcher_env: Mapping[str, str], tmp_path: Path
) -> None:
    """Some container images name both user and group 65534 `nobody`."""
    inside = ("unshare", "--user", "--map-root-user", "--mount")
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        skip_or_fail("this machine allows no user namespaces: it needs `unshare --user`")
    (tmp_path / "group").write_text("root:x:0:\nnobody:x:65534:\n")
    (tmp_path / "passwd").write_text("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    binds = " && ".join(f'mount --bind "$0/{name}" /etc/{name}' for name in ("group", "passwd"))
    code = "import sys; from launcher.security import ownership as o; from launcher.plan.run_dir import RunDir as R; "
    code += "print(o.location_problem(R(o.Path(sys.argv[1]))))"

    def problem() -> str:
        command = [*inside, "sh", "-c", f'{binds} && exec "$@"', str(tmp_path), sys.executable, "-c", code, str(folder / "demo")]
        return subprocess.run(command, env=launcher_env, capture_output=True, text=True, check=True, timeout=60).stdout

    os.chown(folder, MALLORY, TEAM)
    assert problem() == "None\n"
    folder.chmod(0o775)
    assert f"{folder} can be written by the group nobody" in problem()


@pytest.mark.parametrize("trusted", ["", f"group:{TEAM}"])
def test_folders_that_a_run_makes_are_not_open_to_others_because_of_the_umask(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trusted: str
) -> None:
    """With umask 002, a user whose group is not their own would be refused what the launcher itself made."""
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", trusted)
    os.chown(folder, -1, TEAM)
    # What is made here belongs to the group.
    folder.chmod(0o2755)
    mask = os.umask(0o002)
    try:
        make_own_folder(folder / "mine/runs")
    finally:
        os.umask(mask)
    for path in (folder / "mine", folder / "mine/runs"):
        assert path.stat().st_mode & 0o777 == (0o775 if trusted else 0o755)
    assert ownership.location_problem(RunDir(folder / "mine/runs/first")) is None
    (folder / "mine/runs").chmod(0o770)
    make_own_folder(folder / "mine/runs")
    assert (folder / "mine/runs").stat().st_mode & 0o777 == 0o770, "a folder that exists is not changed"


def test_folders_and_links_of_others_may_be_nested_to_any_depth(folder: Path) -> None:
    """Each link leads to a folder with the next link; the folders are nested, too."""
    inner = folder
    for i in range(100):
        inner /= "n"
        inner.mkdir()
        (folder / f"{i}").mkdir()
        (folder / f"{i}/next").symlink_to(f"../{i + 1}")
    for last in (inner, folder / "100"):
        last.mkdir(exist_ok=True)
        os.chown(last, MALLORY, -1)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        nested = ownership.folder_problem("it", folder, tree(folder / "n"))
        linked = ownership.folder_problem("it", folder, [folder / "0/next"])
    finally:
        sys.setrecursionlimit(limit)
    assert nested is not None
    assert nested.message.endswith(f"n/n belongs to {MALLORY}")
    assert linked is not None
    assert linked.message.endswith(f"100 belongs to {MALLORY}")
