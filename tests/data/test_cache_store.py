"""The data cache, and the cache into which repositories are downloaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from plan_fixtures import GOLDEN, REGENERATE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from unusual_files import MALLORY, as_root, give

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.config.sections.model import ModelSection
from launcher.data import cache_dir
from launcher.data.build import build
from launcher.data.cache_dir import cache_root
from launcher.data.cache_store import FORMAT_VERSION, cache_key, find, read_report, read_samples
from launcher.data.packing import choose_evenly
from launcher.data.split import DocumentOrigins, Split
from launcher.errors import DataError
from launcher.models import found_model
from launcher.plan.launch_plan import DataFacts

__all__ = ["as_root"]
Section = Callable[..., DataSection]
Jsonl = Callable[..., Path]
BUILDER = """
import sys
from launcher.config.sections.data import DataSection
from launcher.data import build as module
from launcher.data.tokenization.encoder import import_tokenizers_without_torch
# As launcher.worker.prepare does.
import_tokenizers_without_torch()
data, tokenizer, pause = DataSection.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3] == "pause"
def progress(stage, done, total):
    print(stage, flush=True)
    if pause and stage == "pack and write" and done == 1:
        import time
        time.sleep(120)
print(module.build(data, tokenizer, progress).model_dump_json(), flush=True)
"""
# The same sources give the same cache unless FORMAT_VERSION changes, because caches of one version are reused

DIGESTS_FILE = GOLDEN / "data_cache.json"
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
COMMIT = "1" * 40
REPOSITORY = "models--owner--name"


def documents(split: Split) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    slices = [slice(a, b) for a, b in zip(split.docs[:-1], split.docs[1:], strict=True)]
    return [(tuple(split.tokens[s].tolist()), tuple(split.trained[s].tolist())) for s in slices]


def assert_sound(split: Split, max_length: int) -> None:
    assert split.rows[0] == split.docs[0] == 0
    assert split.rows[-1] == split.docs[-1] == len(split.tokens) == len(split.trained)
    lengths = np.diff(split.rows)
    assert (lengths > 0).all()
    assert (lengths <= max_length).all()
    assert set(split.rows.tolist()) <= set(split.docs.tolist())
    assert not split.trained[np.asarray(split.docs[:-1])].any()
    assert np.add.reduceat(split.columns["num_trained"], np.searchsorted(split.docs, split.rows[:-1])).tolist() == [
        int(split.trained[a:b].sum()) for a, b in zip(split.rows[:-1], split.rows[1:], strict=True)
    ]
    assert (split.tokens.dtype, split.trained.dtype) == (np.uint32, np.uint8)


@pytest.mark.parametrize("packing", [True, False])
def test_the_opened_cache_is_the_one_that_was_built(section: Section, tokenizer_dir: Path, packing: bool) -> None:
    data = section(packing=packing, eval_fraction=0.2)
    stages = []
    facts = build(data, str(tokenizer_dir), lambda *progress: stages.append(progress))
    assert stages[0][0] == "tokenize"
    assert stages[-1][1] == stages[-1][2]
    split, held_out = Split.open(facts), Split.open(facts, held_out=True)
    assert_sound(split, data.max_length)
    assert_sound(held_out, data.max_length)
    assert (split.num_rows, split.num_docs) == (facts.num_rows, facts.num_docs)
    assert split.num_docs + held_out.num_docs == 200
    assert (split.num_rows == split.num_docs) is not packing
    assert facts.num_tokens == len(split.tokens)
    assert facts.num_eval_tokens == len(held_out.tokens)
    assert facts.num_trained_tokens == split.trained[:].sum() == split.columns["num_trained"].sum()
    assert facts.padding_frac == pytest.approx(1 - facts.num_tokens / (facts.num_rows * np.diff(split.rows).max()))
    assert find(cache_key(data, str(tokenizer_dir))) == facts
    assert build(data, str(tokenizer_dir), lambda *progress: pytest.fail("built again")) == facts
    folder = Path(facts.cache_dir)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "eval")] == [0o700, 0o700]


def test_packing_changes_rows_but_no_document(section: Section, tokenizer_dir: Path) -> None:
    packed, single = (
        Split.open(build(section(packing=packing, max_length=256), str(tokenizer_dir))) for packing in (True, False)
    )
    assert sorted(documents(packed)) == sorted(documents(single))
    assert packed.num_rows < single.num_rows / 2


def test_the_share_held_out_stays_when_rows_are_added(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    def held_out(count: int) -> tuple[set, set]:
        rows = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(count)]
        rows += rows[:10]
        data = DataSection(
            sources=(Source(path=str(jsonl(rows))),),
            max_length=64,
            eval_fraction=0.3,
        )
        facts = build(data, str(tokenizer_dir))
        return set(documents(Split.open(facts))), set(documents(Split.open(facts, held_out=True)))

    few_train, few_held_out = held_out(100)
    many_train, many_held_out = held_out(150)
    assert few_train < many_train
    assert few_held_out < many_held_out
    assert not many_train & many_held_out
    assert 0.2 < len(many_held_out) / 150 < 0.4


def test_an_eval_file_and_the_limit_on_rows(section: Section, jsonl: Jsonl, tokenizer_dir: Path) -> None:
    message = {"role": "user", "content": "?"}
    rows = [{"messages": [message, {"role": "assistant", "content": "word " * i}]} for i in range(1, 60)]
    data = section(eval_path=str(jsonl(rows, "eval.jsonl")))
    facts = build(data, str(tokenizer_dir))
    assert facts.num_docs == 200
    assert read_report(facts.cache_dir)["num_eval_docs"] == 59
    limited = data.model_copy(update={"eval_max_rows": 3})
    cut = build(limited, str(tokenizer_dir))
    assert (cut.num_rows, cut.num_eval_rows) == (facts.num_rows, 3)
    assert cut.digest.split("-")[0] == facts.digest.split("-")[0] != cut.digest.split("-")[1] != facts.digest.split("-")[1]
    split, whole = Split.open(cut, held_out=True), Split.open(facts, held_out=True)
    assert_sound(split, 128)
    assert [split.tokens[split.row_tokens(row)].tolist() for row in range(3)] == [
        whole.tokens[whole.row_tokens(row)].tolist() for row in choose_evenly(whole.num_rows, 3)
    ]
    report = read_report(cut.cache_dir)
    assert [source["held_out_unused"] for source in report["sources"]] == [0, 59 - report["num_eval_docs"]]
    origins_of = DocumentOrigins.open(cut.cache_dir, held_out=True)
    assert len({origins_of.where(number) for number in range(split.num_docs)}) == split.num_docs == report["num_eval_docs"]


@pytest.mark.rest
def test_stdlib_docs_brings_its_own_held_out_split(tokenizer_dir: Path) -> None:
    data = DataSection(sources=(Source(path="builtin:stdlib_docs"),), max_length=256, eval_max_rows=8)
    facts = build(data, str(tokenizer_dir))
    assert facts.num_docs > 2500
    assert facts.num_eval_rows == 8
    assert facts.padding_frac < 0.1
    assert 0.3 < facts.num_trained_tokens / facts.num_tokens < 0.8
    samples = read_samples(facts.cache_dir)
    assert len(samples) == 4
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    for sample in samples:
        assert tokenizer.decode(sample["prompt_ids"]).endswith(
            f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert sample["answer"]


def test_no_trained_token_at_all_is_an_error(jsonl: Jsonl, tokenizer_dir: Path, cache_home: Path) -> None:
    path = jsonl([{"messages": [{"role": "user", "content": "hello?"}]}])
    with pytest.raises(DataError, match="no document with a trained token"):
        build(DataSection(sources=(Source(path=str(path)),)), str(tokenizer_dir))
    assert [entry.suffix for entry in (cache_home / "data").iterdir()] == [".lock"]


def test_the_cache_key_depends_on_what_determines_the_tokens(
    section: Section, chats: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    data = section(eval_fraction=0.1)
    key = cache_key(data, str(tokenizer_dir))
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "model.safetensors").write_bytes(b"weights do not count")
    assert cache_key(data, str(copy)) == key
    moved = shutil.copy(chats, tmp_path / "moved.jsonl")
    assert cache_key(section(eval_fraction=0.1, sources=(Source(path=str(moved)),)), str(copy)) == key
    same = {"name": "other", "workers": 3, "checks": ChecksSection(no_turn_end="keep", secrets="fail")}
    assert cache_key(data.model_copy(update=same), str(copy)) == key

    changes = {"max_length": 64, "packing": False, "eval_fraction": 0.2, "eval_max_rows": 3, "long_documents": "split"}
    changes |= {"train_on": "all", "system": "Be brief.", "checks": ChecksSection(secrets="drop")}
    keys = {cache_key(data.model_copy(update={name: value}), str(copy)) for name, value in changes.items()}
    keys.add(cache_key(section(eval_path=str(moved)), str(copy)))
    keys.add(cache_key(section(sources=(Source(path=str(chats), format="messages"),), eval_fraction=0.1), str(copy)))
    with (copy / "chat_template.jinja").open("a") as file:
        file.write(" ")
    keys.add(cache_key(data, str(copy)))
    with chats.open("a") as file:
        file.write(" ")
    keys.add(cache_key(data, str(tokenizer_dir)))
    for setting in ({"weight": 2.0}, {"max_tokens": 100}, {"epochs": 2.0}, {"name": "other"}):
        keys.add(cache_key(section(sources=(Source(path=str(moved), **setting),), eval_fraction=0.1), str(copy)))
    assert len(keys - {key}) == len(changes) + 8


def test_the_cache_key_depends_on_template_held_out_split_and_libraries(
    section: Section, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    data = section(chat_template=str(template))
    keys = [cache_key(data, str(tokenizer_dir))]
    assert cache_key(section(chat_template=str(shutil.copy(template, tmp_path / "moved.jinja"))), str(tokenizer_dir)) == keys[0]
    keys.append(cache_key(data.model_copy(update={"eval_split": "test"}), str(tokenizer_dir)))
    template.write_text("{{ messages }} ")
    keys.append(cache_key(data, str(tokenizer_dir)))
    for library in ("transformers", "tokenizers"):
        with monkeypatch.context() as patched:
            patched.setattr(
                "launcher.data.cache_store.version", lambda name, other=library: "0" if name == other else version(name)
            )
            keys.append(cache_key(data, str(tokenizer_dir)))
    assert len(set(keys)) == 5


def test_a_folder_without_a_tokenizer_is_refused(section: Section, tmp_path: Path) -> None:
    for name in ("config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match="no tokenizer"):
            cache_key(section(), str(tmp_path))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("LAUNCHER_CACHE")
    assert cache_root() == tmp_path / "xdg" / "launcher"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "launcher"


def test_a_damaged_cache_is_rebuilt(section: Section, tokenizer_dir: Path) -> None:
    data = section(eval_fraction=0.2)
    facts = build(data, str(tokenizer_dir))
    tokens = Path(facts.cache_dir) / "tokens.npy"
    good = tokens.read_bytes()
    for damage in (lambda: tokens.write_bytes(good[:-4]), tokens.unlink, (tokens.parent / "meta.json").unlink):
        damage()
        assert find(cache_key(data, str(tokenizer_dir))) is None
        assert build(data, str(tokenizer_dir)) == facts
        assert tokens.read_bytes() == good


def start_builder(data: DataSection, tokenizer_dir: Path, pause: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, data.model_dump_json(), str(tokenizer_dir), "pause" if pause else ""]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.rest
def test_two_builders_at_once_make_one_cache(section: Section, tokenizer_dir: Path, cache_home: Path) -> None:
    builders = [start_builder(section(eval_fraction=0.2), tokenizer_dir) for _ in range(2)]
    outputs = [builder.communicate(timeout=120)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(len(lines) > 1 for lines in outputs) == [False, True], "one builds, the other waits and reads"
    assert_sound(Split.open(DataFacts.model_validate_json(outputs[0][-1])), 128)
    assert sorted(entry.suffix for entry in (cache_home / "data").iterdir()) == ["", ".lock"]


@pytest.mark.rest
def test_a_killed_builder_leaves_no_finished_cache(section: Section, tokenizer_dir: Path, cache_home: Path) -> None:
    data = section(eval_fraction=0.2)
    builder = start_builder(data, tokenizer_dir, pause=True)
    assert builder.stdout is not None
    deadline = time.monotonic() + 60
    partial = cache_home / "data" / f"{cache_key(data, str(tokenizer_dir))}.partial"
    while not (partial / "meta.json").exists():
        assert time.monotonic() < deadline
        assert builder.poll() is None
        time.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    builder.wait(timeout=30)
    assert find(cache_key(data, str(tokenizer_dir))) is None
    facts = build(data, str(tokenizer_dir))
    assert_sound(Split.open(facts), 128)
    assert not partial.exists()


def test_a_missing_cache_is_reported_with_its_path(section: Section, tokenizer_dir: Path) -> None:
    facts = build(section(), str(tokenizer_dir))
    shutil.rmtree(facts.cache_dir)
    with pytest.raises(DataError, match="cannot be read"):
        Split.open(facts)


def test_a_source_that_grows_during_the_build_is_refused(section: Callable[..., DataSection], tokenizer_dir: Path) -> None:
    data = section()
    file = Path(data.sources[0].path)

    def grows(stage: str, done: int, total: int) -> None:
        if stage == "compare" and not done:
            with file.open("a") as rows:
                rows.write(json.dumps({"text": "one more"}) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        build(data, str(tokenizer_dir), grows)
    assert not list((cache_root() / "data").glob("*/meta.json"))


@pytest.mark.rest
def test_a_full_disk_is_reported_and_leaves_no_partial_cache(section: Section, tokenizer_dir: Path, cache_home: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)){BUILDER}"
    command = [sys.executable, "-c", code, section(max_length=512).model_dump_json(), str(tokenizer_dir), ""]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    message = done.stderr.partition("launcher.errors.DataError: ")[2]
    assert message.startswith("the launcher's cache cannot be used: File too large"), done.stderr
    assert str(cache_home / "data") in message
    assert [entry.suffix for entry in (cache_home / "data").iterdir()] == [".lock"]


def test_a_cache_folder_that_cannot_be_written_is_reported(
    section: Section, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="the launcher's cache cannot be used: Not a directory") as caught:
        build(section(), str(tokenizer_dir))
    assert "set LAUNCHER_CACHE to a folder on another disk" in caught.value.problems[0].remedy


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


def compare_digests(file: Path, digests_now: dict[str, Any]) -> None:
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
    compare_digests(DIGESTS_FILE, {"format": FORMAT_VERSION, "digests": digests_now})


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The Hub's cache, which others can reach, and a launcher's cache of this user."""
    temporary = tempfile.TemporaryDirectory(dir="/tmp")
    Path(temporary.name).chmod(0o755)
    folder = Path(temporary.name, "home/shared")
    folder.mkdir(mode=0o755, parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "launcher"))
    cache_dir.print_once.cache_clear()
    with temporary:
        yield folder


def add_snapshot(cache: Path) -> Path:
    repository = cache / REPOSITORY
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cache: cache.chmod(0o777), "can be written by everyone"),
        (lambda cache: cache.parent.chmod(0o777), "can be written by everyone"),
        (lambda cache: give(cache), f"belongs to {MALLORY}"),
    ],
)
def test_where_others_can_write_nothing_is_downloaded(
    shared: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], reason: str
) -> None:
    snapshot = add_snapshot(shared)
    assert cache_dir.download_cache() == shared
    assert capsys.readouterr().err == ""
    change(shared)
    own = cache_dir.own_hub_cache()
    assert cache_dir.download_cache() == own
    said = capsys.readouterr().err
    assert said.startswith("the Hub's cache is not trusted: ")
    assert reason in said
    assert f"; downloads go to {own}; to use the Hub's cache: " in said
    assert own.stat().st_mode & 0o777 == 0o700
    model = ModelSection(path="owner/name")
    assert found_model.locate("owner/name", model).folder == snapshot, "what is there is still read"
    downloaded = add_snapshot(own)
    assert found_model.locate("owner/name", model).folder == downloaded, "nobody else can replace it"
