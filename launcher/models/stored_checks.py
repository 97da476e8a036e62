"""Results of launcher.worker.checks.model_check, which needs torch, in the launcher's cache under a digest of their inputs."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from launcher.config.sections.model import ModelSection
from launcher.data import cache_dir
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts
from launcher.runs import atomic_files

_ISOLATION, _COUNTS = "isolation-checks", "parameter-counts"
# Increase this when the probe changes, so that stored verdicts are not used.
_FORMAT = 6


def load(kind: str, key: Any) -> dict[str, Any] | None:
    """Read the stored result of a kind of check; None if there is none. Raises DataError if other users could have written it."""
    file = _name_file(kind, key)
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def save(kind: str, key: Any, values: Mapping[str, Any]) -> None:
    """Store the result of a check. Raises DataError if the launcher's cache cannot be written."""
    file = _name_file(kind, key)
    with cache_dir.convert_os_errors(file.parent):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_json(file, values)


def _name_file(kind: str, key: Any) -> Path:
    digest = xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())
    return cache_dir.cache_root() / kind / f"{digest}.json"


def load_verdict(facts: ModelFacts, model: ModelSection) -> IsolationVerdict | None:
    """Read the stored verdict on this architecture and attention kernel; None if it was not probed."""
    values = load(_ISOLATION, _make_isolation_key(facts, model))
    return None if values is None else IsolationVerdict.model_validate(values)


def save_verdict(facts: ModelFacts, model: ModelSection, verdict: IsolationVerdict) -> None:
    """Store a verdict. Raises DataError if the launcher's cache cannot be written."""
    save(_ISOLATION, _make_isolation_key(facts, model), verdict.model_dump())


def unknown_verdict(model: ModelSection, reason: str) -> IsolationVerdict:
    """Return the verdict for a probe without a result; the ranks measure the loaded model."""
    version = importlib.metadata.version("transformers")
    return IsolationVerdict(outcome="unknown", kernel=model.attention, transformers=version, detail=reason)


def load_num_params(facts: ModelFacts, model: ModelSection) -> int | None:
    """Read the number of parameters of this architecture; None if transformers did not count them."""
    values = load(_COUNTS, _make_architecture_key(facts, model))
    return None if values is None else int(values["num_params"])


def save_num_params(facts: ModelFacts, model: ModelSection, num_params: int) -> None:
    """Store the number of parameters. Raises DataError if the launcher's cache cannot be written."""
    save(_COUNTS, _make_architecture_key(facts, model), {"num_params": num_params})


def _make_isolation_key(facts: ModelFacts, model: ModelSection) -> list[Any]:
    version, *architecture = _make_architecture_key(facts, model)
    return [_FORMAT, version, model.attention, *architecture]


def _make_architecture_key(facts: ModelFacts, model: ModelSection) -> list[Any]:
    code = sorted(Path(facts.path).glob("*.py")) if model.trust_remote_code and facts.path else []
    digests = [[file.name, xxhash.xxh3_64_hexdigest(file.read_bytes())] for file in code]
    return [importlib.metadata.version("transformers"), facts.config, digests]
