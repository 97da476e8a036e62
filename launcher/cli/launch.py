"""The composing verbs: train, plan, data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

from launcher import facts, run_store
from launcher.cli import text
from launcher.cli.follow import follow
from launcher.clusters.base import check_startable, cluster_for
from launcher.config.compose import Composed, conf_dir, run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import DataError, Problem, RunError
from launcher.plan.launch_plan import Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan

_USAGE = {
    "train": "python -m launcher [train] [--detach] [overrides]\n\nPlan, prepare, start; here, follow the run to its end.",
    "plan": "python -m launcher plan [--json] [overrides]\n\nShow everything that is decided and start nothing.",
    "data": "python -m launcher data [--json] [overrides]\n\nBuild the data cache, report on it, show the masks.",
}


def run(verb: str, tokens: list[str]) -> int:
    """Compose the settings and carry out the verb, once or, with -m, once per job."""
    own = {flag: flag in tokens for flag in ("--json", "--detach")}
    rest = [token for token in tokens if token not in own]
    if "--help" in rest or "-h" in rest:
        return _help(verb)
    codes: list[int] = []

    def each(composed: Composed) -> None:
        if verb == "plan":
            codes.append(_plan(composed, own["--json"]))
        elif verb == "data":
            codes.append(_data(composed, own["--json"]))
        else:
            codes.append(_train(composed, detach=own["--detach"]))

    run_hydra(rest, each)
    return max(codes, default=0)


def _plan(composed: Composed, as_json: bool) -> int:
    plan = make_plan(composed.config, facts.gather(composed.config, composed.overrides))
    print(plan.to_json() if as_json else "\n".join(text.plan_lines(plan)))
    return 0


def _data(composed: Composed, as_json: bool) -> int:
    facts.check(composed.config)
    answer = prepare(composed.config, want_report=True)
    print(json.dumps(answer["report"], indent=2) if as_json else answer["text"])
    return 0


def _train(composed: Composed, detach: bool) -> int:
    config = composed.config
    facts.check(config)
    if not facts.is_known(config.model):
        prepare(config, want_report=False)
    gathered = facts.gather(config, composed.overrides)
    plan = make_plan(config, gathered)
    cluster = cluster_for(config.cluster.kind)
    check_startable(plan)
    cluster.check(plan)
    if not facts.is_prepared(config, gathered):
        prepare(config, want_report=False)
        gathered = facts.gather(config, composed.overrides)
    plan = _unused_name(config, gathered)
    print("\n".join(text.plan_lines(plan)), flush=True)
    run_dir = run_store.create(plan)
    attempt = run_store.next_attempt(run_dir, resume_step=None)
    cluster.submit(run_dir, attempt, run_dir.plan)
    if detach:
        shown = text.short(run_dir.root)
        print(f"\nstarted. Follow it: python -m launcher logs {shown} -f\nstop it:         python -m launcher cancel {shown}")
        return 0
    return follow(run_dir, attempt, cluster)


def _unused_name(config: RunConfig, gathered: Facts) -> LaunchPlan:
    """A plan whose generated name is free; a name that the user chose is never changed."""
    plan = make_plan(config, gathered)
    while config.run.name is None and Path(plan.run_dir).exists():
        later = datetime.fromisoformat(gathered.provenance.created_at) + timedelta(seconds=1)
        provenance = gathered.provenance.model_copy(update={"created_at": later.strftime("%Y-%m-%dT%H:%M:%SZ")})
        gathered = gathered.model_copy(update={"provenance": provenance})
        plan = make_plan(config, gathered)
    return plan


def prepare(config: RunConfig, want_report: bool) -> dict[str, object]:
    """Fetch, convert and build in a process of its own, because that needs torch.

    Raises:
        DataError: with what the process found wrong.
        RunError: where it ended otherwise.
    """
    command = [sys.executable, "-m", "launcher.worker.prepare", *(["--report"] if want_report else [])]
    done = subprocess.run(command, input=config.model_dump_json(), stdout=subprocess.PIPE, text=True, env=worker_environment())
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise RunError(f"preparing the data ended with exit code {done.returncode}; its messages stand above") from None
    if "problems" in answer:
        raise DataError([Problem(*parts) for parts in answer["problems"]])
    if done.returncode:
        raise RunError(f"preparing the data ended with exit code {done.returncode}")
    return answer


def worker_environment() -> dict[str, str]:
    """The environment of a process that runs this package's heavy side by name."""
    root = str(Path(facts.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _help(verb: str) -> int:
    print(f"{_USAGE[verb]}\n\nOptions of each group (group=option):")
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        print(f"  {group.name:<11}{', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
    print("\ndocs/config.md lists every setting. Hydra's flags: --cfg job, --info, -m, --config-dir DIR.")
    return 0
