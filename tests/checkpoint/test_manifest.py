from __future__ import annotations

import json
import math
import re

import pytest

from launcher.atomic_files import FileEntry
from launcher.checkpoint.manifest import Manifest

WHOLE = Manifest(
    step=7, world_size=2, plan_digest="d1ge57", attempt=1, eval_loss=1.5, files={"rank-00000.safetensors": FileEntry(3, "ab")}
)
REMOVED = object()


def test_a_manifest_survives_a_round_trip():
    assert Manifest.from_json(WHOLE.to_json().encode()) == WHOLE
    assert list(json.loads(WHOLE.to_json())) == [
        "format_version",
        "step",
        "world_size",
        "plan_digest",
        "attempt",
        "eval_loss",
        "files",
    ]


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_non_finite_loss_is_stored_as_null(loss):
    text = Manifest(step=7, world_size=2, plan_digest="d", attempt=1, eval_loss=loss, files={}).to_json()
    assert Manifest.from_json(text.encode()).eval_loss is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step", REMOVED, "step: is missing"),
        ("step", -1, "step: is not a whole number of at least 0"),
        ("step", True, "step: is not a whole number"),
        ("step", "7", "step: is not a whole number"),
        ("world_size", 0, "world_size: is not a whole number of at least 1"),
        ("attempt", None, "attempt: is not a whole number"),
        ("format_version", 1.5, "format_version: is not a whole number"),
        ("plan_digest", 5, "plan_digest: is not text"),
        ("eval_loss", "low", "eval_loss: is not a number"),
        ("owner", "someone", "'owner': is unknown"),
        ("files", REMOVED, "not an object with files"),
        ("files", [], "not an object with files"),
        ("files", {"../state.json": {"size": 1, "xxh3_128": "ab"}}, "'../state.json' is not the name of a file"),
        ("files", {".hidden": {"size": 1, "xxh3_128": "ab"}}, "'.hidden' is not the name of a file"),
        ("files", {"state.json\n": {"size": 1, "xxh3_128": "ab"}}, "is not the name of a file"),
        ("files", {"state.json": {"size": 1}}, "files: 'state.json' needs a size and a digest"),
        ("files", {"state.json": None}, "files: 'state.json' needs a size and a digest"),
        ("files", {"state.json": {"size": -1, "xxh3_128": "ab"}}, "files: 'state.json' needs a number of bytes"),
        (
            "files",
            {"state.json": {"size": 1, "xxh3_128": 5}},
            "files: 'state.json' needs a number of bytes and a digest as text",
        ),
    ],
)
def test_an_invalid_field_is_refused_by_name(key, value, said):
    values = json.loads(WHOLE.to_json())
    values = {name: of for name, of in values.items() if name != key} | ({} if value is REMOVED else {key: value})
    with pytest.raises(ValueError, match=re.escape(said)):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize(("written", "loss"), [("2", 2.0), ("1" * 400, math.inf)])
def test_an_integer_loss_is_accepted(written, loss):
    found = Manifest.from_json(WHOLE.to_json().replace("1.5", written).encode()).eval_loss
    assert isinstance(found, float)
    assert found == loss


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe\x00", b"[" * 100_000])
def test_content_that_is_not_an_object_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(content)
