"""The question that is asked before starting runs that are expected to cost more than run.confirm_usd."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher.cli.removal import read_yes
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.throughput import SpeedEstimate
from launcher.tracking.costs import largest_usd


def require_consent(planned: Sequence[tuple[LaunchPlan, SpeedEstimate]]) -> bool:
    """Ask on the terminal whether runs above run.confirm_usd, which one of them has, may start; returns True if they may.

    The lowest run.confirm_usd in a sweep is compared with the total cost of its runs.

    Raises:
        ConfigError: if there is no terminal to ask on.
    """
    limits = [plan.config.run.confirm_usd for plan, _ in planned if plan.config.run.confirm_usd is not None]
    # CPUs without a price cost nothing.
    costs = [largest_usd(plan, speed) for plan, speed in planned if plan.topology.device == "cuda" or plan.price is not None]
    known = [usd for usd in costs if usd is not None]
    unknown = len(costs) - len(known)
    if not unknown and sum(known) <= min(limits):
        return True
    runs = f"{len(planned)} runs" if len(planned) > 1 else "the run"
    if not unknown:
        message = f"{runs} may cost up to ${sum(known):,.2f}"
    elif known:
        message = f"{runs} may cost more than ${sum(known):,.2f}: the cost of {unknown} is not known"
    else:
        message = f"the cost of {runs} is not known"
    where = f"run.confirm_usd={min(limits):g}"
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        remedy = "to start without a question, add --yes; or raise run.confirm_usd, or limit the cost with run.max_usd"
        raise ConfigError(f"{message}, and there is no terminal to ask on", where=where, remedy=remedy)
    return read_yes(f"{message} ({where}). Start?")
