from __future__ import annotations

from collections.abc import Sequence

import pytest
from plan_fixtures import config_of, golden, plan_of

from launcher.config.compose import conf_dir

__all__ = ["config_of", "golden", "plan_of"]


def shipped() -> Sequence[tuple[str, ...]]:
    """Return one command line per file under conf/, which covers every option of every group."""
    lines = []
    for file in sorted(conf_dir().glob("*/*.yaml")):
        token = f"{file.parent.name}={file.stem}"
        extra = ["cluster.container_image=owner/image:tag"] if token == "cluster=slurm_pyxis" else []
        extra += ["data.path=rows.jsonl"] if token == "data=jsonl" or file.parent.name == "experiment" else []
        lines.append((token, *extra))
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shipped_tokens" in metafunc.fixturenames:
        lines = shipped()
        metafunc.parametrize("shipped_tokens", lines, ids=[line[0] for line in lines])
