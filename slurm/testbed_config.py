"""The settings of a testbed, and the configuration files that connect Slurm's daemons. Nothing here has side effects."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# A GPU without a device file makes its node INVAL; any character device will do.
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx")
NUM_SLOTS = 100
SEARCH_PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
# Programs, and the Debian packages that contain them.
BASIC = {
    **{"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "sbatch": "slurm-client", "munged": "munge"},
    **{"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"},
}
FOR_ACCOUNTING = {
    **{"slurmdbd": "slurmdbd", "sacct": "slurm-client", "mariadbd": "mariadb-server-core"},
    **{"mariadb-install-db": "mariadb-server-core", "my_print_defaults": "mariadb-client-core"},
}

SLURM_CONF = """\
ClusterName=testbed
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={root}/run/munge.sock,cred_expire={requeue_wait_s}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
# submitit keeps what it knows of a job by its number: no two clusters may share numbers.
FirstJobId={first_job}
# No cgroups, no PMI, no checks against the hardware.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,nohold_on_prolog_fail
KillWait={kill_wait_s}
# One dead node holds up the pings for a MessageTimeout: living nodes are taken for dead, too, unless
# SlurmdTimeout is above 1.5 x MessageTimeout, and on a busy machine more.
SlurmdTimeout={slurmd_timeout_s}
MessageTimeout={message_timeout_s}
ReturnToService=2
JobRequeue={requeue}
# A job in "high" preempts jobs in "main": their --signal at once, a requeue GraceTime later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
{optional}
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL PriorityTier=1 PreemptMode=OFF MaxTime=2 State=UP
"""

# Only AccountingStoragePass tells the connection to slurmdbd about a non-default munge socket: AuthInfo does not reach it.
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller}
AccountingStoragePort={dbport}
AccountingStoragePass={root}/run/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr={controller}
DbdPort={dbport}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CommitDelay=0
"""

# Accounts, users and QOS, as arguments of sacctmgr.
ASSOCIATIONS = (
    ("add", "cluster", "testbed"),
    ("add", "qos", "urgent", "priority=100", "maxwall=10"),
    ("add", "account", "research", "cluster=testbed"),
    ("add", "user", "root", "account=research", "cluster=testbed", "defaultaccount=research", "qos=normal,urgent"),
)

# Without cgroups, Slurm kills a step that exceeds its memory when it next samples it; --mem must then be correct.
OVER_MEMORY = """\
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill"""

# The first process of a node. As PID 1 (netns) it also reaps orphans, which slurmd would not do.
NODE_SCRIPT = """\
{isolate}
while :; do
    test -e {root}/run/{node}/hold || slurmd -D -N {node}
    sleep 0.2
done
"""
# The private hosts file also avoids a resolver: Slurm looks up the name of every address that contacts it, and a resolver that
# does not answer costs 5 s per request.
OWN_HOSTS = "mount --bind {root}/conf/{hosts} /etc/hosts"
OWN_NODE = "hostname {node}\nmount -t tmpfs -o mode=1777 tmpfs /dev/shm\n" + OWN_HOSTS


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What to start. Each slot has its own addresses and ports, so clusters in different slots can run at the same time."""

    mode: Literal["auto", "netns", "plain"] = _option("auto", "how nodes are kept apart; auto: netns where it works, else plain")
    slot: int = _option(0, f"0 to {NUM_SLOTS - 1}; which addresses and ports to use")
    nodes: int = _option(3, "number of nodes, named n1, n2, ...")
    cpus: int = _option(4, "CPUs that each node says it has")
    gpus: int = _option(0, f"GPUs that each node says it has, 0 to {len(GPU_FILES)}; none of them computes")
    memory_mb: int = _option(4000, "main memory that each node says it has, in MB")
    accounting: bool = _option(True, "slurmdbd, and so sacct, accounts and qualities of service")
    requeue: bool = _option(True, "let jobs be requeued that do not say whether they may (JobRequeue)")
    kill_over_memory: bool = _option(False, "kill jobs that take more memory than they asked for")
    prolog: str = _option("", "program that slurmd runs before the first step of a job on each node (Prolog)")
    grace_s: int = _option(10, "seconds between a preempted job's signal and its requeue (GraceTime)")
    requeue_wait_s: int = _option(5, "seconds that a requeued job waits, 5 or more (cred_expire)")
    kill_wait_s: int = _option(5, "seconds between TERM and KILL (KillWait)")
    slurmd_timeout_s: int = _option(20, "seconds after which a silent node is down (SlurmdTimeout)")
    message_timeout_s: int = _option(5, "seconds that a message may take (MessageTimeout)")

    def __post_init__(self) -> None:
        if not 0 <= self.slot < NUM_SLOTS:
            raise ValueError(f"slot is {self.slot}; it is a number from 0 to {NUM_SLOTS - 1}")
        if not 1 <= self.nodes <= 200:
            raise ValueError(f"nodes is {self.nodes}; it is a number from 1 to 200")
        if not 0 <= self.gpus <= len(GPU_FILES):
            raise ValueError(f"gpus is {self.gpus}; it is a number from 0 to {len(GPU_FILES)}")
        if self.requeue_wait_s < 5:
            raise ValueError(f"requeue_wait_s is {self.requeue_wait_s}; Slurm takes no less than 5")


@dataclass(frozen=True)
class Layout:
    """Addresses and ports of a started cluster; stored in its folder, so that any process can use the cluster."""

    isolated: bool
    tag: str
    port: int
    controller: str
    addresses: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The names of the nodes."""
        return list(self.addresses)


def missing_commands(accounting: bool = True) -> list[str]:
    """The programs that a testbed needs and this machine lacks."""
    needed = [*BASIC, *(FOR_ACCOUNTING if accounting else ())]
    return [name for name in needed if not shutil.which(name, path=SEARCH_PATH)]


def install_command(missing: Sequence[str]) -> str:
    """The command that installs these programs on Debian and Ubuntu."""
    packages = sorted({(BASIC | FOR_ACCOUNTING)[name] for name in missing})
    return f"apt-get install --no-install-recommends {' '.join(packages)}"


def layout(settings: Settings, isolated: bool) -> Layout:
    """The addresses and ports of the slot; `isolated` nodes are namespaces on a bridge, others share the loopback interface."""
    slot = settings.slot
    subnet = f"10.213.{slot}" if isolated else f"127.77.{slot}"
    return Layout(
        isolated=isolated,
        tag=f"sltb{slot}",
        port=16800 + 20 * slot,
        controller=f"10.213.{slot}.1" if isolated else "127.0.0.1",
        addresses={f"n{i}": f"{subnet}.{10 + i}" for i in range(1, settings.nodes + 1)},
    )


def config_files(root: Path, settings: Settings, at: Layout) -> dict[str, str]:
    """The names and contents of the files in `root`/conf."""
    host = socket.gethostname()
    where = {"root": root, "host": host, "controller": at.controller, "port": at.port, "dbport": at.port + 1}
    nodes = [
        f"NodeName={node} NodeHostname={node if at.isolated else host} NodeAddr={address} CPUs={settings.cpus}"
        f" Port={at.port + 2 + (0 if at.isolated else i)} RealMemory={settings.memory_mb}"
        + (f" Gres=gpu:{settings.gpus}" if settings.gpus else "")
        for i, (node, address) in enumerate(at.addresses.items())
    ]
    optional = [
        ACCOUNTING.format(**where) if settings.accounting else "",
        OVER_MEMORY if settings.kill_over_memory else "",
        f"Prolog={settings.prolog}" if settings.prolog else "",
    ]
    slurm = SLURM_CONF.format(
        **where,
        **{**asdict(settings), "requeue": int(settings.requeue), "nodes": "\n".join(nodes)},
        optional="\n".join(filter(None, optional)),
        first_job=int(time.time() * 10) % 60_000_000,
    )
    own_hosts = {f"hosts-{node}": hosts(at) for node in at.names}
    return {
        "slurm.conf": slurm,
        "slurmdbd.conf": SLURMDBD_CONF.format(**where),
        "gres.conf": "".join(f"Name=gpu File={file}\n" for file in GPU_FILES[: settings.gpus]),
        "hosts": hosts(at),
        **own_hosts,
    }


def hosts(at: Layout, on_loopback: str = "") -> str:
    """/etc/hosts of the daemons and nodes; the node `on_loopback` resolves to 127.0.1.1, as on Debian."""
    named = {node: "127.0.1.1" if node == on_loopback else address for node, address in at.addresses.items()}
    lines = [("localhost", "127.0.0.1"), (socket.gethostname(), at.controller), *named.items()]
    return "".join(f"{address} {name}\n" for name, address in lines)


def node_script(root: Path, at: Layout, node: str) -> str:
    """The bash script that runs as a node."""
    isolate = OWN_NODE.format(root=root, node=node, hosts=f"hosts-{node}") if at.isolated else ""
    return NODE_SCRIPT.format(isolate=isolate, root=root, node=node)


def with_hosts(root: Path, at: Layout, *command: str) -> list[str]:
    """Wrap `command` for a daemon on the host, so that it can resolve the nodes' names."""
    if not at.isolated:
        return [*command]
    script = OWN_HOSTS.format(root=root, hosts="hosts") + '; exec "$@"'
    return ["unshare", "--mount", "bash", "-c", script, "-", *command]


def daemon_commands(root: Path) -> dict[str, list[str]]:
    """The commands that start munged and mariadbd, and the one that creates mariadbd's data folder."""
    conf, run, db = root / "conf", root / "run", root / "db"
    # mariadbd deletes all temporary tables in its tmpdir when it starts, also those of another testbed.
    common = [f"--tmpdir={db}", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"]
    return {
        "munged": [
            *("munged", "--foreground", "--force", f"--key-file={conf}/munge.key", f"--socket={run}/munge.sock"),
            *(f"--pid-file={run}/munge.pid", f"--log-file={root}/log/munged.log", f"--seed-file={run}/munge.seed"),
        ],
        "mariadb-install-db": [
            *("mariadb-install-db", "--no-defaults", "--user=root", "--basedir=/usr", f"--datadir={db}/data"),
            *("--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve", *common),
        ],
        "mariadbd": [
            *("mariadbd", "--no-defaults", "--user=root", "--basedir=/usr", f"--datadir={db}/data", f"--socket={db}/sock"),
            *(f"--pid-file={db}/pid", "--skip-networking", "--skip-grant-tables", f"--init-file={db}/init.sql"),
            *("--innodb-lock-wait-timeout=900", "--innodb-buffer-pool-size=64M", "--performance-schema=OFF"),
            *("--skip-log-bin", *common),
        ],
    }


def munge_key() -> bytes:
    """A secret shared only by this cluster's daemons and commands."""
    return os.urandom(128)
