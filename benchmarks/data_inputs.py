"""Rows for benchmarks/data.py: written to files for all sides, and read back as token ids for comparison."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Common words for short documents; most are a single token.
_COMMON_WORDS = (
    "about after again air all along also animal answer around ask away back because before began being below between "
    "book both boy build came carry change city close color could country cover cut day did different door down draw "
    "earth eat end enough even every example eye face family far farm father feet few field find fire fish five food "
    "form found four friend from full game garden gave girl give glass good gold grass great green ground grow half hand "
    "happy hard hear heavy help high hill home horse hot house hundred idea important inch island keep kind king land "
    "large last late laugh learn leave left letter life light line list listen little live long look machine made make "
    "many map mark measure men mile minute money month moon more morning mother mountain move much music name near night "
    "north note notice number ocean often old open order page paper part pattern people picture piece place plain plan "
    "plant point power problem question quick rain reach read river road rock room round rule run school science sea "
    "second seed ship short show simple sing sky sleep slow snow song sound south space spell stand star start state "
    "stone stop story street strong study sun table talk teach tell test thing think time town travel tree true turn "
    "under voice walk wall warm watch water week wheel white wind winter wood word work world write year yellow young "
)
COPIES = 4


def chats(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the questions and answers of each data set."""
    gsm8k = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text().splitlines()]
    alpaca = json.loads((data / "alpaca_en_demo.json").read_text())
    return {
        "gsm8k": [(row["question"], row["answer"]) for row in gsm8k],
        "alpaca": [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in alpaca],
    }


def write_chats(file: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """Write one chat of two messages per line."""
    with file.open("w") as out:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def copies(pairs: list[tuple[str, str]], num_copies: int = COPIES) -> Iterator[tuple[str, str]]:
    """Yield all pairs several times, each time with different numbers in them."""
    for copy in range(num_copies):
        for question, answer in pairs:
            yield _with_other_numbers(question, copy), _with_other_numbers(answer, copy)


def _with_other_numbers(text: str, copy: int) -> str:
    return re.sub(r"\d+", lambda match: str(int(match[0]) * (copy + 1) + copy), text) if copy else text


def write_short(file: Path, num_documents: int, seed: int = 0) -> Path:
    """Write prompts with completions of one to three words, 9 to 38 words in total: about 10 to 40 tokens."""
    rng, words = random.Random(seed), _COMMON_WORDS.split()
    with file.open("w") as out:
        for _ in range(num_documents):
            prompt = " ".join(rng.choices(words, k=rng.randint(8, 35)))
            completion = " " + " ".join(rng.choices(words, k=rng.randint(1, 3)))
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return file


def launcher_documents(report: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the token ids of all documents, including held-out ones, in the cache reported by `launcher data --json`."""
    from launcher.data import cache_store
    from launcher.data.split import Split

    facts = cache_store.read(Path(report["cache_dir"]))
    assert facts is not None
    for held_out in (False, True):
        if held_out and not (report["held_out"] or {}).get("documents"):
            continue
        split = Split.open(facts, held_out=held_out)
        for document in range(split.num_docs):
            yield split.tokens[split.docs[document] : split.docs[document + 1]]


def packed_rows(files: list[str]) -> Any:
    """Return the rows that map_and_pack.py wrote to `files`, as a data set of `input_ids` and `seq_lengths`."""
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(file) for file in files]).with_format("numpy")


def packed_documents(files: list[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of all documents in the rows that map_and_pack.py wrote to `files`."""
    for row in packed_rows(files):
        yield from np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])


def digest(documents: Iterable[np.ndarray]) -> tuple[int, int, str]:
    """Return the number of documents, the number of tokens, and a digest that does not depend on document order."""
    ids = [np.ascontiguousarray(document, np.uint32) for document in documents]
    each = sorted(hashlib.blake2b(document, digest_size=8).digest() for document in ids)
    return len(ids), sum(map(len, ids)), hashlib.blake2b(b"".join(each), digest_size=8).hexdigest()
