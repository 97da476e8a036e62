"""Restricts Hydra to composing settings: it runs no code that a file or an override names.

When composing, Hydra calls the classes that `hydra.callbacks`, `hydra.job_logging` and `hydra.hydra_logging` name. For a sweep it
also calls those in `hydra.sweeper` and `hydra.launcher`, and each job of a sweep has its own section `hydra`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from launcher.config.introspect import leaves
from launcher.errors import ConfigError
from launcher.security.credentials import environment_secrets

# Values from conf/config.yaml and from Hydra. Other values would change the environment, or make Hydra write its own files.
_NEUTRAL: dict[str, Any] = {
    **{"hydra.job.env_set": {}, "hydra.job.env_copy": [], "hydra.job.chdir": None},
    **{"hydra.output_subdir": None, "hydra.run.dir": ".", "hydra.sweep.subdir": "."},
}
# The classes that run a sweep, with Hydra's values.
_PLUGINS = {
    "hydra.launcher": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra.sweeper": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
READS_CREDENTIAL = "a setting must not read this variable, which looks like a secret"
# The reference to an environment variable, as in ${oc.env:USER}.
_VARIABLE = "oc.env"
# Hydra's modules that hold the function that configures logging.
_LOGGING = ("hydra._internal.hydra", "hydra._internal.core_plugins.basic_launcher", "hydra.core.utils")
# Hydra's modules that hold the function that runs a job.
_JOBS = ("hydra._internal.hydra", "hydra._internal.core_plugins.basic_launcher")


@contextmanager
def guarded() -> Iterator[None]:
    """Guard the composition within this block. Hydra's errors about refused settings become ConfigErrors."""
    from hydra._internal import hydra
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    class RefusedCallbacks(hydra.Callbacks):
        def __init__(self, config: Any = None) -> None:
            if config is not None:
                require_composing_only(config)
            super().__init__(None)

    replacements: list[tuple[Any, str, Any]] = [
        (hydra, "Callbacks", RefusedCallbacks),
        *((importlib.import_module(module), "configure_log", lambda *_, **__: None) for module in _LOGGING),
        *((module, "run_job", _checked_job(module.run_job)) for module in map(importlib.import_module, _JOBS)),
    ]
    originals = [getattr(owner, name) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        OmegaConf.register_new_resolver(_VARIABLE, _read_variable, replace=True)
        yield
    finally:
        OmegaConf.register_new_resolver(_VARIABLE, oc.env, replace=True)
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _read_variable(name: str, *default: Any) -> Any:
    """Return an environment variable, unless it holds a credential: within a value, no check would find it for certain."""
    from omegaconf.resolvers import oc

    if environment_secrets({name: os.environ.get(name, "")}):
        raise ValueError(f"{name}: {READS_CREDENTIAL}")
    return oc.env(name, *default)


def require_composing_only(config: Any) -> None:
    """Refuse composed settings, including Hydra's own section, that make Hydra call, set or write something.

    Raises:
        ConfigError: listing the settings.
    """
    from omegaconf import OmegaConf

    changed = [key for key, value in _NEUTRAL.items() if (OmegaConf.select(config, key) or value) != value]
    if changed:
        raise ConfigError(
            f"{changed[0]}: Hydra composes settings here, and neither sets variables nor writes files",
            where=", ".join(changed),
            remedy="remove it from the command line and from the files of the chosen options",
        )
    for key, name in _PLUGINS.items():
        _require_plain_plugin(key, name, OmegaConf.to_container(OmegaConf.select(config, key), resolve=True))
    callbacks = OmegaConf.select(config, "hydra.callbacks")
    if callbacks:
        raise ConfigError(
            "hydra.callbacks: a setting must not name code to run; nothing was called",
            where="hydra.callbacks",
            value=", ".join(map(str, callbacks)),
            remedy="remove hydra.callbacks from the command line and from the files of the chosen options",
        )


def _require_plain_plugin(key: str, name: str, values: Any) -> None:
    """Refuse a class that is not Hydra's own, and values that Hydra would call: it instantiates everything inside them.

    Raises:
        ConfigError: naming the setting.
    """
    targets = {inner: value for inner, value in leaves(values) if "_target_" in inner.split(".")}
    if targets == {"_target_": name}:
        return
    called = next((inner for inner in targets if inner != "_target_"), "_target_")
    raise ConfigError(
        f"{key}: a setting must not name code to run; nothing was called",
        where=f"{key}.{called}",
        value=str(targets.get(called, "")),
        remedy=f"remove {key} from the command line and from the files of the chosen options",
    )


def _checked_job(run_job: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run_job)
    def run_checked(*args: Any, **kwargs: Any) -> Any:
        require_composing_only(kwargs["config"])
        return run_job(*args, **kwargs)

    return run_checked
