"""The cluster itself: its daemons, its network, its nodes, and the faults that can be injected."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from testbed_config import (
    ASSOCIATIONS,
    SEARCH_PATH,
    Layout,
    Settings,
    config_files,
    daemon_commands,
    hosts,
    layout,
    munge_key,
    node_script,
    with_hosts,
)

DEFAULT_ROOT = "/tmp/slurm-testbed"
COMMAND_DEADLINE_S = 60.0
READY_DEADLINE_S = 30.0
POLL_S = 0.05
# Each check scans all processes of the machine, so check less often than every POLL_S.
LOOK_FOR_PROCESS_S = 1.0
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld")
HOSTS_MARK = "# slurm-testbed"
PRIVATE_MOUNT = "slurm-testbed-private"


class TestbedError(RuntimeError):
    """The testbed could not do what was asked of it."""

    __test__ = False


class SlotTaken(TestbedError):
    """Another program uses the ports of the slot."""


def _require_own(root: Path) -> None:
    """Refuse a cluster folder that another user created or can write to.

    Raises:
        TestbedError: If the folder is refused; the message says why.
    """
    try:
        status = root.lstat()
    except FileNotFoundError:
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        owner = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        raise TestbedError(f"{root} is no folder that only its user can write to ({owner}); remove it, or name another --root")


class Testbed:
    """The cluster whose files are in `root`, whether started or not. The path must be short, because it holds Unix sockets."""

    __test__ = False

    def __init__(self, root: str | Path = DEFAULT_ROOT) -> None:
        self.root = Path(root)
        _require_own(self.root)
        self._children: list[subprocess.Popen[bytes]] = []
        self._record = self.root / "conf/testbed.json"
        self._layout = Layout(**json.loads(self._record.read_text())) if self._record.exists() else None

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that Slurm's commands need to use this cluster."""
        return {"SLURM_CONF": f"{self.root}/conf/slurm.conf", "PATH": SEARCH_PATH}

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with `variables`."""
        return {**os.environ, **self.variables}

    @property
    def layout(self) -> Layout:
        """Nodes and addresses; raises TestbedError if the cluster was not started."""
        if self._layout is None:
            raise TestbedError(f"no cluster was started in {self.root}")
        return self._layout

    @property
    def names(self) -> list[str]:
        """The names of the nodes: n1, n2, ..."""
        return self.layout.names

    def run(self, *command: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this cluster, like subprocess.run with text."""
        argv = [str(word) for word in command]
        return subprocess.run(argv, check=check, text=True, env=self.env, **{"timeout": COMMAND_DEADLINE_S, **options})

    def output(self, *command: object) -> str:
        """The output of such a command, empty if it failed."""
        return self.run(*command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout

    # Start and stop

    def start(self, settings: Settings | None = None) -> None:
        """Start a cluster and return when all its nodes are idle; a cluster that runs in the same root is stopped first.

        Raises:
            SlotTaken: If another cluster uses the slot.
            TestbedError: If a daemon does not become ready; its log stays in `root`/log.
        """
        settings = settings or Settings()
        self.stop()
        # In a folder such as /tmp, another user can create `root` first, with files that say what to start and kill.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(self.root)
        isolated = settings.mode == "netns" or (settings.mode == "auto" and self._can_isolate())
        self._layout = at = layout(settings, isolated)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", at.port))
            except OSError:
                self._layout = None
                raise SlotTaken(f"port {at.port} is taken: another testbed runs in slot {settings.slot}") from None
        try:
            self._write_files(settings, at)
            self._connect()
            self._start_daemons(settings)
        except BaseException:
            self.stop(keep_files=True)
            raise

    def stop(self, keep_files: bool = False) -> None:
        """Kill every process of the cluster, undo its network changes and remove its folder; may be called again."""
        self._kill_all(None)
        self._disconnect()
        self._record.unlink(missing_ok=True)
        self._layout = None
        if not keep_files:
            shutil.rmtree(self.root, ignore_errors=True)

    def reset(self) -> None:
        """Cancel all jobs and repair all nodes, hosts files and mounts; returns when every node is idle."""
        there = {owner for _, owner in self._owners()}
        if "slurmctld" not in there:
            self.start_controller()
        # Kill running jobs at once: scancel alone would wait KillWait for a job that ignores SIGTERM or saves.
        self.output("scancel", "--full", "--signal=KILL", "--state=RUNNING", "-u", "root")
        self.output("scancel", "--full", "-u", "root")
        for node in self.names:
            if self.layout.isolated:
                self.run("ip", "link", "set", f"{self.layout.tag}-{node}", "up")
                self.own_loopback_name(node, on=False)
            self.revive(node)
            if node not in there:
                self.boot(node)
        # See `heal`: otherwise Slurm notices these nodes only much later.
        self.output("scontrol", "update", f"NodeName={','.join(self.names)}", "State=RESUME")
        self._wait_for("slurmctld", lambda: not self.output("squeue", "-h"), COMMAND_DEADLINE_S)
        # This resumes drained nodes; nodes that are down come back by themselves.
        self.output("scontrol", "update", f"NodeName={','.join(self.names)}", "State=RESUME")
        self._wait_for("slurmctld", self.idle, COMMAND_DEADLINE_S)
        if self.layout.isolated:
            for node, first in self._first_processes().items():
                for path in _private_mounts(first):
                    self.private_unmount(node, path)

    def _write_files(self, settings: Settings, at: Layout) -> None:
        for name in ("conf", "log", "state", "spool", "db", *(f"run/{part}" for part in (*at.names, *DAEMONS))):
            (self.root / name).mkdir(parents=True)
        conf = self.root / "conf"
        self._record.write_text(json.dumps(asdict(at)))
        for name, text in config_files(self.root, settings, at).items():
            (conf / name).write_text(text)
        (conf / "munge.key").write_bytes(munge_key())
        for secret in ("munge.key", "slurmdbd.conf"):
            (conf / secret).chmod(0o600)

    def _start_daemons(self, settings: Settings) -> None:
        self._spawn("munged", *daemon_commands(self.root)["munged"])
        self._wait_for("munged", (self.root / "run/munge.sock").exists)
        if settings.accounting:
            self._start_database()
            # Start slurmdbd before slurmctld, which would otherwise invent a cluster ID that slurmdbd then rejects.
            self._spawn("slurmdbd", *with_hosts(self.root, self.layout, "slurmdbd", "-D"), MYSQL_UNIX_PORT=f"{self.root}/db/sock")
            self._wait_for("slurmdbd", lambda: self._listens(self.layout.port + 1))
            for change in ASSOCIATIONS:
                self.run("sacctmgr", "--immediate", "--quiet", *change, stdout=subprocess.DEVNULL)
        self.start_controller()
        for node in self.names:
            self.boot(node)
        self._wait_for("slurmctld", self.idle)

    def _start_database(self) -> None:
        db, commands = self.root / "db", daemon_commands(self.root)
        db.chmod(0o700)  # the only protection: the database has no passwords
        log = self.root / "log/mariadb-install-db.out"
        with log.open("w") as out:
            if self.run(*commands["mariadb-install-db"], stdout=out, stderr=out, check=False).returncode != 0:
                errors = "; ".join(line for line in log.read_text().splitlines() if "ERROR" in line)
                raise TestbedError(f"mariadb-install-db failed: {errors or log.read_text()[-1000:]}")
        # Create the database here, not by slurmdbd: with libmariadb3 11.8.9, after a handle's first connection meets an unknown
        # database, each query on it fails ("maximum allowed number of columns (=0)") and slurmdbd dies.
        (db / "init.sql").write_text("CREATE DATABASE IF NOT EXISTS slurm;\n")
        self._spawn("mariadbd", *commands["mariadbd"])
        self._wait_for("mariadbd", (db / "sock").exists)

    # The controller

    def start_controller(self) -> None:
        """Start slurmctld; returns when it answers."""
        self._spawn("slurmctld", *with_hosts(self.root, self.layout, "slurmctld", "-D"))
        self._wait_for("slurmctld", lambda: self._listens(self.layout.port))

    def stop_controller(self) -> None:
        """Stop slurmctld, which saves its state: jobs keep running, but Slurm commands get no answer."""
        for pid in self.processes("slurmctld"):
            _signal(pid, signal.SIGTERM)
        end = time.monotonic() + READY_DEADLINE_S
        while self.processes("slurmctld"):
            if time.monotonic() > end:
                raise TestbedError(f"slurmctld does not end; see {self.root}/log")
            time.sleep(POLL_S)

    def restart_controller(self) -> None:
        """Stop and start slurmctld; returns when it answers again."""
        self.stop_controller()
        self.start_controller()

    # Processes

    def _spawn(self, name: str, *command: str, **env: str) -> None:
        """Start a daemon; its working directory and environment identify it and its descendants later."""
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.root / "run" / name,
                env={**self.env, "SLURM_TESTBED": f"{self.root}/run/{name}", **env},
            )
        self._children.append(child)

    def processes(self, name: str | None = None) -> list[int]:
        """Host process IDs of a daemon, or of a node with its jobs' tasks; without a name, of the whole cluster."""
        for child in self._children:
            child.poll()  # reap
        return [pid for pid, owner in self._owners() if owner and name in (None, owner) and pid != os.getpid()]

    def slurmd(self, node: str) -> list[int]:
        """Host process IDs of a node's slurmd, without its jobs' tasks."""
        found = []
        for pid in self.processes(node):
            with suppress(OSError):  # the process may have ended
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmd\0"):
                    found.append(pid)
        return found

    def _owners(self) -> Iterator[tuple[int, str | None]]:
        """Yield every process of the machine with the daemon or node of this cluster that it belongs to, or None."""
        own: dict[int, str | None] = {}
        parents: dict[int, int] = {}
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                owner = self._own_mark(proc)
                # The name in parentheses may contain spaces.
                parents[int(proc.name)] = int((proc / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            own[int(proc.name)] = owner
        for pid in own:
            # A process that sets its own title overwrites its environment; it belongs to the same node as its parent.
            of, seen = pid, {pid}
            while own.get(of) is None and (of := parents.get(of, 0)) in own and of not in seen:
                seen.add(of)
            yield pid, own.get(of)

    def _own_mark(self, proc: Path) -> str | None:
        """The daemon or node that a process's own environment or working directory names.

        Raises:
            OSError: If the process has ended.
        """
        run, conf = f"{self.root}/run/", f"{self.root}/conf/slurm.conf".encode()
        cwd, program = os.readlink(proc / "cwd"), os.readlink(proc / "exe")
        environ = (proc / "environ").read_bytes()
        env = dict(entry.partition(b"=")[::2] for entry in environ.split(b"\0"))
        task, mark = env.get(b"SLURMD_NODENAME", b"").decode(), env.get(b"SLURM_TESTBED", b"").decode()
        # During exec a process has no environment, and slurmstepd overwrites its own; both keep slurmd's working directory.
        if not environ or (not mark and Path(program).name.startswith("slurm")):
            mark = cwd
        if task and env.get(b"SLURM_CONF") == conf:
            return task
        return mark.removeprefix(run) if mark.startswith(run) else None

    def _kill_all(self, name: str | None) -> None:
        end = time.monotonic() + READY_DEADLINE_S
        while pids := self.processes(name):
            if time.monotonic() > end:
                raise TestbedError(f"these processes cannot be killed: {pids}")
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _wait_for(self, name: str, test: Callable[[], object], deadline_s: float = READY_DEADLINE_S) -> None:
        end = time.monotonic() + deadline_s
        look = time.monotonic() + LOOK_FOR_PROCESS_S
        while not test():
            now = time.monotonic()
            if now > end or (now > look and not self.processes(name)):
                raise TestbedError(f"{name} is not ready; nodes are {self.states()}; see {self.root}/log")
            look = now + LOOK_FOR_PROCESS_S if now > look else look
            time.sleep(POLL_S)

    def _listens(self, port: int) -> bool:
        with socket.socket() as client:
            return client.connect_ex((self.layout.controller, port)) == 0

    # The network

    def _can_isolate(self) -> bool:
        inside = ("unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--mount-proc")
        tried = self.run(*inside, "ip", "link", "add", "sltb", "type", "bridge", check=False, capture_output=True)
        return tried.returncode == 0

    def _connect(self) -> None:
        at = self.layout
        if not at.isolated:
            with Path("/etc/hosts").open("a") as file:
                file.writelines(f"{address} {node} {HOSTS_MARK}\n" for node, address in at.addresses.items())
            return
        self.run("ip", "link", "add", at.tag, "type", "bridge")
        self.run("ip", "addr", "add", f"{at.controller}/24", "dev", at.tag)
        self.run("ip", "link", "set", at.tag, "up")
        for node, address in at.addresses.items():
            ns = f"{at.tag}-{node}"
            self.run("ip", "netns", "add", ns)
            self.run("ip", "link", "add", ns, "type", "veth", "peer", "name", "eth0", "netns", ns)
            self.run("ip", "link", "set", ns, "master", at.tag, "up")
            self.run("ip", "-n", ns, "addr", "add", f"{address}/24", "dev", "eth0")
            self.run("ip", "-n", ns, "link", "set", "eth0", "up")
            self.run("ip", "-n", ns, "link", "set", "lo", "up")

    def _disconnect(self) -> None:
        at = self._layout
        if at is None:
            return
        if not at.isolated:
            file = Path("/etc/hosts")  # written in place: in a container it is a bind mount
            file.write_text("".join(line for line in file.read_text().splitlines(True) if HOSTS_MARK not in line))
            return
        for node in at.names:
            self.output("ip", "netns", "del", f"{at.tag}-{node}")
            self.output("ip", "link", "del", f"{at.tag}-{node}")
        self.output("ip", "link", "del", at.tag)

    # The nodes

    def states(self) -> dict[str, str]:
        """Slurm's state of each node, such as {'n1': 'idle', 'n2': 'down*'}; empty if slurmctld does not answer."""
        return dict(line.split() for line in self.output("sinfo", "-hNp", "main", "-o", "%N %t").splitlines())

    def idle(self) -> bool:
        """Whether all nodes are idle: none has a job or a fault."""
        return set(self.states().values()) == {"idle"}

    def boot(self, node: str) -> None:
        """Power a node on, after powering it off."""
        self.kill(node)
        self.revive(node)
        ns = f"--net=/run/netns/{self.layout.tag}-{node}"
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        inside = ["nsenter", ns, *apart] if self.layout.isolated else []
        self._spawn(node, *inside, "bash", "-c", node_script(self.root, self.layout, node))

    def kill(self, node: str) -> None:
        """Send SIGKILL to every process of a node at once."""
        self._kill_all(node)

    def crash(self, node: str) -> None:
        """Kill a node's slurmd; its tasks keep running, and it stays down until `revive`."""
        (self.root / "run" / node / "hold").touch()
        for pid in self.slurmd(node):
            _signal(pid, signal.SIGKILL)

    def revive(self, node: str) -> None:
        """Allow slurmd to start again."""
        (self.root / "run" / node / "hold").unlink(missing_ok=True)

    def cut(self, node: str) -> None:
        """Disconnect a node from the network."""
        self._needs_netns("cut")
        self.run("ip", "link", "set", f"{self.layout.tag}-{node}", "down")

    def heal(self, node: str) -> None:
        """Reconnect a node to the network."""
        self._needs_netns("heal")
        self.run("ip", "link", "set", f"{self.layout.tag}-{node}", "up")
        # Otherwise Slurm notices a node that is down only about 40 s later.
        self.output("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def exec(self, node: str, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside a node, like `run`."""
        self._needs_netns("exec")
        return self.run("nsenter", "-t", self._init(node), "--net", "--uts", "--mount", "--pid", *command, **options)

    def private_mount(self, node: str, path: str | Path) -> None:
        """Mount an empty folder over `path` in one node, so that it does not share the contents with the other nodes."""
        self.exec(node, "mount", "-t", "tmpfs", PRIVATE_MOUNT, path)

    def private_unmount(self, node: str, path: str | Path) -> None:
        """Undo `private_mount`."""
        self.exec(node, "umount", "--lazy", path)

    def own_loopback_name(self, node: str, on: bool = True) -> None:
        """Make a node's own name resolve to 127.0.1.1 there, as Debian's installer does; `on=False` undoes this."""
        self._needs_netns("own_loopback_name")
        # Write in place: the node has this file mounted.
        (self.root / "conf" / f"hosts-{node}").write_text(hosts(self.layout, node if on else ""))

    def _init(self, node: str) -> int:
        """The node's process with PID 1 inside the node."""
        try:
            return self._first_processes()[node]
        except KeyError:
            raise TestbedError(f"{node} is switched off") from None

    def _first_processes(self) -> dict[str, int]:
        """Each node's process with PID 1 inside the node."""
        found = {}
        for pid, owner in self._owners():
            if owner in self.names:
                with suppress(OSError):
                    numbers = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].partition("\n")[0].split()
                    if numbers[-1:] == ["1"]:
                        found[owner] = pid
        return found

    def _needs_netns(self, what: str) -> None:
        if not self.layout.isolated:
            raise TestbedError(f"{what} needs nodes with a network of their own (mode netns)")


def _private_mounts(pid: int) -> list[str]:
    """The folders over which `private_mount` has mounted, as this process sees them, newest first."""
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    # /proc escapes spaces and similar characters as octal.
    return [path.encode().decode("unicode_escape") for source, path, *_ in reversed(mounts) if source == PRIVATE_MOUNT]


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
