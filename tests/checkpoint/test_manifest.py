from __future__ import annotations

import json
import math

import pytest

from launcher.atomic_files import FileEntry
from launcher.checkpoint.manifest import Manifest

WHOLE = Manifest(
    step=7, world_size=2, plan_digest="d1ge57", attempt=1, eval_loss=1.5, files={"rank-00000.safetensors": FileEntry(3, "ab")}
)
REMOVED = object()


def test_a_manifest_survives_a_round_trip():
    assert Manifest.from_json(WHOLE.to_json().encode()) == WHOLE


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_non_finite_loss_is_stored_as_null(loss):
    text = Manifest(step=7, world_size=2, plan_digest="d", attempt=1, eval_loss=loss, files={}).to_json()
    assert Manifest.from_json(text.encode()).eval_loss is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", REMOVED),
        ("world_size", "2"),
        ("eval_loss", "low"),
        ("files", []),
        ("files", {"../state.json": {"size": 1, "xxh3_128": "ab"}}),
        ("files", {"state.json": {"size": 1}}),
    ],
)
def test_an_invalid_field_is_refused_by_name(key, value):
    values = json.loads(WHOLE.to_json())
    values = {name: of for name, of in values.items() if name != key} | ({} if value is REMOVED else {key: value})
    with pytest.raises(ValueError, match=key):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00"])
def test_content_that_is_not_an_object_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(content)
