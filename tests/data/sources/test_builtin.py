from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.data.sources.builtin import MAX_WORDS, NUM_PAIRS, list_pairs


def test_there_are_about_3000_pairs_of_sensible_length() -> None:
    assert 0.9 * NUM_PAIRS <= len(list_pairs()) <= NUM_PAIRS
    assert all(pair.symbol in pair.question for pair in list_pairs())
    assert all(3 <= len(pair.answer.split()) <= MAX_WORDS + 60 for pair in list_pairs())
    assert len({pair.question.replace(pair.symbol, "X") for pair in list_pairs()}) >= 12


def test_the_held_out_pairs_share_nothing_with_the_others() -> None:
    held_out = [pair for pair in list_pairs() if pair.held_out]
    rest = [pair for pair in list_pairs() if not pair.held_out]
    assert 0.03 <= len(held_out) / len(list_pairs()) <= 0.07
    assert not {pair.symbol for pair in held_out} & {pair.symbol for pair in rest}

    def docstrings(split: list) -> set[str]:
        return {pair.answer.split("\n\n", 1)[1] if pair.answer.startswith("`") else pair.answer for pair in split}

    assert not docstrings(held_out) & docstrings(rest)


@pytest.mark.rest
def test_stdlib_docs_import_nothing_and_are_the_same_in_every_process() -> None:
    code = (
        "import sys, hashlib; from launcher.data.sources.builtin import list_pairs;"
        "got = repr(list_pairs()).encode();"
        "odd = {'antigravity', 'this', 'tkinter', 'turtle', 'idlelib', 'smtplib', 'sqlite3'} & set(sys.modules);"
        "print(hashlib.sha256(got).hexdigest(), sorted(odd))"
    )
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(
            command,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().endswith("[]\n")
