"""The data caches of eval.sets for an existing run: existing caches are kept, the others are built."""

from __future__ import annotations

from launcher import facts
from launcher.cli.worker_process import prepare_eval_sets
from launcher.config.schema import RunConfig
from launcher.data.sources.reading import find_path_problem
from launcher.errors import ConfigError, DataError, Problem
from launcher.plan.launch_plan import DataFacts


def find_or_build(config: RunConfig, kept: dict[str, DataFacts], tokenizer_path: str | None) -> dict[str, DataFacts]:
    """Return `kept`, keyed by set name, plus the facts of the other sets in `config`; missing caches are built.

    Raises:
        ConfigError, DataError: for a set that cannot be read.
    """
    missing = {key: one for key, one in config.eval.sets_by_setting.items() if one.name not in kept}
    if not missing:
        return kept
    if problems := [p for key, one in missing.items() if (p := find_path_problem(f"{key}.path", one))]:
        raise ConfigError(problems)
    prepare_eval_sets(config)
    built = facts.eval_set_facts(config, tokenizer_path)
    for key, one in missing.items():
        if one.name not in built:
            raise DataError(Problem("the data cache is missing or damaged right after it was built", key, remedy="try again"))
    return {**built, **kept}
