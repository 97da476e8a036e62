"""DeepSpeed's own check of `deepspeed.extra`, before anything is started: `python -m launcher.worker.checks.deepspeed_check`.

Reads a RunConfig as JSON from standard input; prints the problems as one JSON object. Importing DeepSpeed takes seconds, so a
result without problems is cached (facts.accept_extra).
"""

from __future__ import annotations

import json
import sys

from pydantic import ValidationError

from launcher import facts
from launcher.config.error_messages import EXTRA, format_value
from launcher.config.schema import RunConfig
from launcher.errors import DataError, Problem
from launcher.plan.deepspeed import merge_keys
from launcher.security.redaction import printable_output


def check(config: RunConfig) -> list[Problem]:
    """Return a problem for each value in `deepspeed.extra` that DeepSpeed rejects; a result without problems is cached."""
    from deepspeed.runtime.config import DeepSpeedConfig

    dtype: dict[str, object] = {} if config.model.dtype == "fp32" else {config.model.dtype: {"enabled": True}}
    try:
        DeepSpeedConfig(merge_keys({"train_batch_size": 1, "zero_optimization": {"stage": 3}, **dtype}, config.deepspeed.extra))
    except ValidationError as error:
        paths = [".".join([EXTRA, *map(str, item["loc"])]) for item in error.errors()]
        return [
            Problem(f"{path}: DeepSpeed refuses it: {item['msg']}", EXTRA, format_value(path, item["input"]))
            for path, item in zip(paths, error.errors(), strict=True)
        ]
    # DeepSpeed's parser raises many types of exceptions.
    except Exception as error:
        return [Problem(f"DeepSpeed refuses these keys: {str(error).strip() or type(error).__name__}", EXTRA)]
    facts.accept_extra(config)
    return []


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
