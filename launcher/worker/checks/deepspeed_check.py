"""DeepSpeed's own check of `deepspeed.extra`, before anything is started: `python -m launcher.worker.checks.deepspeed_check`.

Reads a RunConfig as JSON from standard input; prints the problems as one JSON object. Importing DeepSpeed takes seconds, so a
result without problems is cached (facts.accepted_extra).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from launcher import facts
from launcher.config.deepspeed_keys import EXTRA, KEYS_PAGE
from launcher.config.error_messages import shown
from launcher.config.schema import RunConfig
from launcher.data import cache_dir
from launcher.errors import DataError, Problem, did_you_mean
from launcher.plan.deepspeed import render
from launcher.plan.launch_plan import Batch, ModelFacts, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.security.printable_stream import printable_output

# The extra keys are merged into a small run's plan, because sizes do not matter here.
_BATCH = Batch(
    global_batch_size=2,
    micro_batch_size=1,
    accumulation=2,
    max_tokens_per_step=2,
    tokens_per_step=None,
    max_steps=1,
    epochs=None,
)
_TOPOLOGY = Topology(nodes=1, ranks_per_node=1, world_size=1, device="cpu", backend="gloo")
_MODEL = ModelFacts(
    path=None,
    tokenizer_path=None,
    num_params=1,
    num_params_exact=True,
    hidden_size=64,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=64,
    vocab_size=64,
    tie_word_embeddings=True,
    config={},
)
# DeepSpeed checks neither names nor values in these sections.
_READ_KEY_BY_KEY = ("aio", "flops_profiler")
# DeepSpeed imports these on every rank if the section is enabled.
_PACKAGES = {"tensorboard": "tensorboard", "comet": "comet_ml"}


class Recorder(dict[str, Any]):
    """A mapping that records which keys were looked up, with each default."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: Recorder(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.looked_up: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.looked_up.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looked_up.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __contains__(self, key: object) -> bool:
        return key in self._recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorder)


def problems_of(config: RunConfig) -> list[Problem]:
    """Return a problem for each key in `deepspeed.extra` that DeepSpeed rejects or ignores."""
    extra = config.deepspeed.extra
    problems = [problem for key in extra for problem in _of_key(key, config)]
    return problems or _of_package(extra) or list(_of_all(config))


def _of_key(key: str, config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of one top-level key, merged into the plan's rendered config."""
    value = config.deepspeed.extra[key]
    recorder = Recorder(_rendered(config, {key: value}))
    failure = []
    try:
        _parse(recorder)
    except ValidationError as error:
        yield from (_of_model(key, error.title, item) for item in error.errors(include_url=False))
        return
    # DeepSpeed's parser raises many types of exceptions.
    except Exception as error:
        message = f"DeepSpeed refuses it: {str(error).strip() or type(error).__name__}"
        failure = [_problem([key], message, value, f"see {KEYS_PAGE}")]
    if key in _READ_KEY_BY_KEY:
        yield from list(_of_names(key, value, recorder[key].looked_up)) or failure
    else:
        yield from list(_of_type([key], value, recorder.looked_up.get(key))) or failure


def _of_names(key: str, section: dict[str, Any], known: dict[str, Any]) -> Iterator[Problem]:
    """Yield the problems of a section whose keys DeepSpeed looks up one by one without validation."""
    for name, value in section.items():
        if name not in known:
            yield _unknown([key, name], value, list(known))
        else:
            yield from _of_type([key, name], value, known[name])


def _of_type(path: list[str], value: Any, default: Any) -> Iterator[Problem]:
    kind = type(default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if kind is float else type(value) is kind
    if default is not None and not fits:
        name = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        yield _problem(path, f"is not {name}", value, f"DeepSpeed's default is {json.dumps(default)}")


def _of_model(key: str, title: str, item: Any) -> Problem:
    """Return the problem for a validation error of the model `title`, which may be an ancestor of the section `key`."""
    location = [str(part) for part in item["loc"]]
    path = location if location[:1] == [key] else [key, *location]
    if item["type"] != "extra_forbidden":
        reason = item["msg"].removeprefix("Value error, ")
        return _problem(path, f"DeepSpeed refuses it: {reason}", item["input"], "set a valid value, or remove the key")
    model = _model_named(title)
    for part in location[:-1]:
        model = _model_in(model, part) or model
    return _unknown(path, item["input"], [field.alias or name for name, field in model.model_fields.items()])


def _of_package(extra: dict[str, Any]) -> list[Problem]:
    return [
        _problem([key], f"the Python package {package} is not installed", extra[key], f"pip install {package}, or remove the key")
        for key, package in _PACKAGES.items()
        if extra.get(key, {}).get("enabled") and find_spec(package) is None
    ]


def _of_all(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if DeepSpeed rejects the combination of all keys."""
    try:
        _parse(_rendered(config, config.deepspeed.extra))
    except Exception as error:
        yield Problem(f"{EXTRA}: DeepSpeed refuses these keys together: {error}", EXTRA, remedy="remove some of them")


def _unknown(path: list[str], value: Any, known: list[str]) -> Problem:
    remedy = did_you_mean(path[-1], known) or f"known here: {', '.join(known)}"
    return _problem(path, "DeepSpeed has no such key", value, remedy)


def _problem(path: list[str], what: str, value: Any, remedy: str) -> Problem:
    key = ".".join([EXTRA, *path])
    return Problem(f"{key}: {what}", EXTRA, "" if isinstance(value, dict | list) else shown(key, value), remedy)


def _model_named(title: str) -> type[BaseModel]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = [DeepSpeedConfigModel]
    for model in models:
        models += model.__subclasses__()
    return next(model for model in models if model.__name__ == title)


def _model_in(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the model of a field, or None if the field is not a model."""
    field = next((f for key, f in model.model_fields.items() if name in (key, f.alias)), None)
    options = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _rendered(config: RunConfig, extra: dict[str, Any]) -> dict[str, Any]:
    section = config.deepspeed.model_copy(update={"extra": extra})
    return render(section, config.model, config.train, _BATCH, _TOPOLOGY, _MODEL, OPTIMIZERS["adamw"], config.deepspeed.nvme_path)


def _parse(values: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils.logging import get_log_level_from_string

    DeepSpeedConfig(values)
    if level := values.get("log_level"):
        # Only the engine's constructor reads it.
        get_log_level_from_string(level)


def check(config: RunConfig) -> list[Problem]:
    """Return the problems of `config`; a result without problems is cached."""
    problems = problems_of(config)
    if not problems:
        accepted = facts.accepted_extra(config)
        with cache_dir.convert_os_errors(accepted.parent):
            accepted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            accepted.touch()
    return problems


def main() -> int:
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        problems = check(config)
    except DataError as error:
        problems = list(error.problems)
    print(json.dumps({"problems": [[p.message, p.where, p.value, p.remedy] for p in problems]}))
    return 0


if __name__ == "__main__":
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main()
    sys.exit(code)
