"""The stored results of probing whether packed documents in a row affect each other in a model.

The probe needs torch and runs in `launcher.worker.checks.isolation_check`. The cache stores its result under a digest of
everything that it depends on, so the submit side reads it without starting a process.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import xxhash

from launcher import atomic_files
from launcher.config.schema import ModelSection
from launcher.data import cache_dir
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts
from launcher.security import ownership

# Increase this when the probe changes, so that stored results are not used.
_FORMAT = 5


def transformers_version() -> str:
    """Return the version of the installed transformers, whose attention masks decide; empty if it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""


def unknown(model: ModelSection, reason: str) -> IsolationVerdict:
    """Return the verdict for a probe without a result; the ranks measure the loaded model."""
    return IsolationVerdict(outcome="unknown", kernel=model.attention, transformers=transformers_version(), detail=reason)


def load(facts: ModelFacts, model: ModelSection) -> IsolationVerdict | None:
    """Read the stored verdict on this architecture and kernel; None if it was not probed."""
    file = _verdict_file(facts, model)
    ownership.require_cache(file)
    try:
        return IsolationVerdict.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def save(facts: ModelFacts, model: ModelSection, verdict: IsolationVerdict) -> None:
    """Store a verdict.

    Raises:
        DataError: if the launcher's cache cannot be written.
    """
    file = _verdict_file(facts, model)
    with cache_dir.convert_os_errors(file.parent):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_json(file, verdict.model_dump())


def _verdict_file(facts: ModelFacts, model: ModelSection) -> Path:
    code = sorted(Path(facts.path).glob("*.py")) if model.trust_remote_code and facts.path else []
    key = [
        _FORMAT,
        transformers_version(),
        model.attention,
        facts.config,
        [[file.name, xxhash.xxh3_64_hexdigest(file.read_bytes())] for file in code],
    ]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())
    return cache_dir.cache_root() / "isolation-checks" / f"{digest}.json"
