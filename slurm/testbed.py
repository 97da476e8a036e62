#!/usr/bin/env python3
"""A real multi-node Slurm cluster on one machine, for trying and testing the launcher.

    python slurm/testbed.py start --nodes 3          # as root; ready after about two seconds
    eval "$(python slurm/testbed.py env)"            # SLURM_CONF: all that sbatch, squeue and the launcher need
    python slurm/testbed.py kill n2   | boot n2      # power off: SIGKILL to every process of the node | on
    python slurm/testbed.py cut n2    | heal n2      # unplug the network cable | plug it in (netns)
    python slurm/testbed.py crash n2  | revive n2    # slurmd dies, its tasks keep running | slurmd is back
    python slurm/testbed.py reset                    # cancel all jobs, repair everything
    python slurm/testbed.py stop                     # leaves nothing behind

Needs root, no systemd, and Debian's slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core
mariadb-client-core iproute2 (with --no-accounting the first four suffice).

netns: each node is a network, PID, UTS and mount namespace, with its own address, host name, /etc/hosts, /proc and
       /dev/shm. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN.
plain: each node is a slurmd with its own port and address in 127.77.0.0/16. Marked lines in /etc/hosts resolve the
       nodes' names, so only one such cluster can run at a time. A container's default capabilities are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

from testbed_cluster import DEFAULT_ROOT, Testbed, TestbedError
from testbed_config import Settings, install_command, missing_commands


def main() -> int:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("SLURM_TESTBED_ROOT", DEFAULT_ROOT), help="folder of the cluster")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for option in fields(Settings):
        is_flag = isinstance(option.default, bool)
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if is_flag else {"type": type(option.default)}
        name = "--" + option.name.replace("_", "-")
        start.add_argument(name, default=option.default, help=option.metadata["help"], **kind)
    for verb in ("stop", "reset", "env", "states", "restart_controller", "stop_controller", "start_controller"):
        verbs.add_parser(verb.replace("_", "-"))
    for verb in ("kill", "boot", "crash", "revive", "cut", "heal", "processes", "own_loopback_name"):
        verbs.add_parser(verb.replace("_", "-")).add_argument("node")
    for verb in ("private_mount", "private_unmount"):
        of_node = verbs.add_parser(verb.replace("_", "-"))
        of_node.add_argument("node")
        of_node.add_argument("path")
    inside = verbs.add_parser("exec")
    inside.add_argument("node")
    inside.add_argument("command", nargs=argparse.REMAINDER)
    arguments = vars(parser.parse_args())
    root, verb = arguments.pop("root"), arguments.pop("verb").replace("-", "_")
    try:
        return _do(Testbed(root), verb, arguments)
    except (TestbedError, ValueError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1


def _do(bed: Testbed, verb: str, arguments: dict[str, Any]) -> int:
    if verb == "env":
        print(f"export SLURM_CONF={bed.root}/conf/slurm.conf")
        return 0
    if verb == "exec":
        return bed.exec(arguments["node"], *arguments["command"], check=False, timeout=None).returncode
    if verb == "start":
        settings = Settings(**arguments)
        missing = missing_commands(settings.accounting)
        if missing:
            raise TestbedError(f"missing: {', '.join(missing)}; {install_command(missing)}")
        if os.geteuid() != 0:
            raise TestbedError("only root may start a testbed")
        bed.start(settings)
        print(f'nodes {", ".join(bed.names)} are idle; now: eval "$(python {sys.argv[0]} --root {bed.root} env)"')
        return 0
    shown = getattr(bed, verb)(*arguments.values())
    if shown is not None:
        print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
