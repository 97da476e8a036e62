"""The same sources give the same cache unless FORMAT_VERSION changes, because caches of one version are reused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from plan_fixtures import GOLDEN, REGENERATE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data.build import build
from launcher.data.cache_store import FORMAT_VERSION

Jsonl = Callable[..., Path]

FILE = GOLDEN / "data_cache.json"
END = "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
# One secret or contact detail of each kind that the checks detect, and harmless lookalikes.
TOLD = (
    "sk-proj-" + "aB3" * 12,
    "hf_" + "aB3" * 11,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3" * 12,
    "AKIA" + "ABCD2345" * 2,
    "xoxb-123456789012-abcdef",
    "AIza" + "aB3_-" * 7,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA",
    "postgres://admin:hunter2!@db.host:5432",
    'password = "correct-horse-battery"',
    "export API_KEY=9f8e7d6c5b4a39281706f5e4d3c2b1a0",
    "db password is s3cretPassw0rd!",
    "Authorization: Bearer abcdef1234567890abcdef",
    "password=hunter2hunter2[/INST]",
    "jane.roe+x@company.co.uk",
    "+49 170 1234567",
    "555-123-4567",
    "0171-1234567",
    "Tel. 089 / 1234 5678",
    "Phone: 0891234567",
    *("password = getpass()", "API_KEY=${API_KEY_V1}", "password: SHA-256-hashed", "from 0900-0130, 100-200 apples"),
    *("opens 0900-1000 1030-1130", "10.000.000 of a@example.com", "key=lambda x: x", "token: str"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {"max_length": 2048, "eval_fraction": 0.1},
    "one document per row": {"max_length": 512, "packing": False, "eval_fraction": 0.3, "eval_max_rows": 5},
    "split": {"max_length": 128, "long_documents": "split", "train_on": "last_turn"},
    "long documents dropped": {"max_length": 1024, "long_documents": "drop", "train_on": "all", "system": "Be brief."},
    "faults dropped": {
        "max_length": 4096,
        "checks": ChecksSection(
            **dict.fromkeys(("secrets", "personal_data", "role_order", "special_token_in_text", "broken_encoding"), "drop"),
            **dict.fromkeys(("exact_duplicate", "near_duplicate", "held_out_in_train", "near_held_out_in_train"), "drop"),
            **dict.fromkeys(("repetitive_answer", "no_turn_end"), "drop"),
        ),
    },
}


@pytest.fixture
def bytes_as_tokens(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are single bytes, independent of installed packages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", END)])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=TEMPLATE)
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def prose(number: int, num_words: int) -> str:
    return f"Row {number}:" + "".join(f" {(number + 3) * (i + 7) ** 3 % 7919:x}" for i in range(num_words))


def chats() -> list[dict[str, Any]]:
    def turns(*contents: str) -> list[dict[str, Any]]:
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]

    called = turns("1 + 2?", "", "3", "It is 3.")
    called[1]["tool_calls"], called[2]["role"] = [CALL], "tool"
    rows = [{"messages": turns(prose(i, i % 9), prose(i + 1000, 3 * i % 61), "And?", f"So {i}.")} for i in range(60)]
    rows += [{"messages": called, "tools": [ADD]}, {"messages": [{"role": "system", "content": "You add."}, *called]}]
    rows += [{"messages": turns(f"What is number {i}?", f"It is: {text}")} for i, text in enumerate(TOLD)]
    rows += [
        *(rows[3], {"messages": turns("Say.", "again and " * 200)}, {"messages": turns("Say.", " ")}),
        *({"messages": turns("a", "b", "c")}, {"messages": turns("<|eot_id|> a", f"b {END}")}),
        *(
            {"messages": turns("caf\u00e9 \ufffd", "don\u00e2\u20ac\u2122t \u65e5\u672c\u8a9e")},
            {"messages": turns("Long.", prose(7, 1200))},
        ),
    ]
    weighted = turns("a", "left out", "b", "trained")
    weighted[1]["weight"] = 0
    return [*rows, {"messages": weighted}]


def sections(jsonl: Jsonl) -> dict[str, DataSection]:
    """Return a data section for each of SETTINGS, with chats, prompts with completions, and plain texts."""
    pairs = [{"prompt": f"Count to {i}:", "completion": "".join(f" {n}" for n in range(i % 40)), "id": i} for i in range(80)]
    texts = [{"text": prose(i, 20 + 13 * i % 300)} for i in range(40)]
    texts += [{"text": texts[5]["text"].upper()}, {"text": f"{texts[39]['text']} and on"}]
    sources = (
        Source(name="chats", path=str(jsonl(chats(), "chats.jsonl"))),
        Source(name="pairs", path=str(jsonl(pairs, "pairs.jsonl")), epochs=1.5),
        Source(name="texts", path=str(jsonl(texts, "texts.jsonl")), max_tokens=20_000),
    )
    apart = [*chats()[:4], *chats()[16:20], {"messages": [*chats()[30]["messages"], *chats()[1]["messages"]]}]
    for row in apart[4:8]:
        row["messages"][0]["content"] += " and on"
    held_out = str(jsonl(apart, "held_out.jsonl"))
    made = {name: DataSection(sources=sources, workers=1, **settings) for name, settings in SETTINGS.items()}
    last = made["faults dropped"]
    return {**made, "faults dropped": last.model_copy(update={"eval_path": held_out})}


def digests(folder: Path, places: str) -> dict[str, str]:
    """Return digests of a cache's arrays, counts and findings, without `places` and values that depend on other packages."""
    meta = json.loads((folder / "meta.json").read_text())
    counts = {"facts": meta["facts"], "report": meta["report"], "files": sorted(meta["files"])}
    texts = {
        "counts": json.dumps(counts, sort_keys=True),
        "findings": re.sub(r"\d+%|1/\d+", "", (folder / "findings.json").read_text()),
        "samples": (folder / "samples.json").read_text(),
    }
    digests_now = {name: text.replace(places, "").encode() for name, text in texts.items()}
    digests_now["arrays"] = b"".join(file.name.encode() + file.read_bytes() for file in sorted(folder.rglob("*.npy")))
    return {name: xxhash.xxh3_128_hexdigest(content) for name, content in digests_now.items()}


def compare(file: Path, digests_now: dict[str, Any]) -> None:
    """Compare with the golden file, or rewrite it; digests may only change together with the version."""
    golden = json.loads(file.read_text()) if file.is_file() else {"format": 0}
    if digests_now == golden:
        return
    version = digests_now["format"]
    assert version > golden["format"], (
        "the same sources give other tokens, rows or findings than before: raise FORMAT_VERSION in launcher/data/cache_store.py "
        f"(now {version}), or caches that were built before are trained on; and write the golden again with {REGENERATE}=1"
    )
    assert os.environ.get(REGENERATE) == "1", f"FORMAT_VERSION is {version} now: write the golden again with {REGENERATE}=1"
    file.write_text(json.dumps(digests_now, indent=1) + "\n")


def test_the_cache_of_the_same_sources_changes_only_with_the_format_version(
    jsonl: Jsonl, bytes_as_tokens: Path, tmp_path: Path
) -> None:
    digests_now = {
        name: digests(Path(build(data, str(bytes_as_tokens)).cache_dir), str(tmp_path)) for name, data in sections(jsonl).items()
    }
    compare(FILE, {"format": FORMAT_VERSION, "digests": digests_now})
