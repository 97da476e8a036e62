from __future__ import annotations

import itertools
import json
import string
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from launcher.data.tokenization import fast_tokenizer
from launcher.data.tokenization.fast_tokenizer import count_tokens_before, make_cached

CORPUS = [
    "The quick brown fox's den, isn't it? 1234 99 x_y(z)\n\n  def f(a):\n\treturn a  # don't\r\n",
    string.printable,
    "caf\u00e9 \u00c0 la \u2013 \u201cd\u00e9j\u00e0\u201d, 5\u00a0\u20ac \u00d7 \u00b2",
    "<|end",
]
KINDS = ("gpt2", "smollm", "qwen2", "llama3")


@cache
def tokenizer(kind: str) -> Tokenizer:
    """Return a small tokenizer that splits text like one of the families."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = {"qwen2": fast_tokenizer._QWEN2, "llama3": fast_tokenizer._LLAMA3}.get(kind)
    if kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|end|>", "<|end|>>", "<x>")])
    return made


SERVED = [character for character in map(chr, range(0x2200)) if fast_tokenizer._SUPPORTED.fullmatch(character)]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["<|end|>", "<|end|>>", "<x>", "'s", "'LL", "'re", " the", "12345", "\r\n", "\n\n", "   ", "\t", "\x1c", "\x7f"]
        ),
        st.text(st.characters(max_codepoint=127), max_size=8),
        st.text(st.sampled_from(SERVED), max_size=8),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_cached_tokens_and_offsets_equal_those_of_the_tokenizer(kind: str, text: str) -> None:
    asked = tokenizer(kind)
    known = make_cached(asked)
    assert known is not None
    encoded = known.encode(text)
    expected = asked.encode(text, add_special_tokens=False)
    assert encoded is not None
    assert encoded[0].tolist() == expected.ids
    assert encoded[0].dtype == np.uint32
    if text.isascii():
        assert encoded[1].tolist() == [end for _, end in expected.offsets]
    for border in range(len(text) + 1):
        before = expected.char_to_token(border) if border < len(text) else len(expected.ids)
        starts = border == len(text) or expected.token_to_chars(before)[0] == border
        found_before = count_tokens_before(text, [border], encoded[1])
        assert found_before == ([before] if starts else None), border


def test_the_demonstration_tokenizer_is_cached(session_tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session_tokenizer.backend_tokenizer
    known = make_cached(asked)
    assert known is not None
    chats = [[{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"It's {a + b}.\n"}]
             for a, b in itertools.product(range(0, 2000, 97), repeat=2)]  # fmt: skip
    texts = [str(text) for text in session_tokenizer.apply_chat_template(chats, tokenize=False)]
    expected = [encoding.ids for encoding in asked.encode_batch(texts, add_special_tokens=False)]
    assert [known.encode(text)[0].tolist() for text in texts] == expected


def test_unsupported_text_is_left_to_the_tokenizer() -> None:
    known = make_cached(tokenizer("gpt2"))
    assert known is not None
    for character in ("\u00a0", "\u00b2", "\u00b5", "e\u0301", "\u4e2d", "\u212b", "\u2003"):
        assert known.encode(f"caf{character}") is None
    assert [len(encoded) for encoded in known.encode("")] == [0, 0]


def altered(**changes: object) -> Tokenizer:
    parts = json.loads(tokenizer("llama3").to_str())
    return Tokenizer.from_str(json.dumps({**parts, **changes}))


def test_an_unsupported_tokenizer_is_not_cached() -> None:
    parts = json.loads(tokenizer("llama3").to_str())
    assert make_cached(altered()) is not None
    assert make_cached(altered(normalizer={"type": "Lowercase"})) is None
    assert make_cached(altered(pre_tokenizer={"type": "Whitespace"})) is None
    assert make_cached(altered(pre_tokenizer=None)) is None
    swallows = [{**token, "rstrip": True} for token in parts["added_tokens"]]
    assert make_cached(altered(added_tokens=swallows)) is None
    assert make_cached(altered(model={**parts["model"], "dropout": 0.1})) is None
    steps = parts["pre_tokenizer"]["pretokenizers"]
    other = {**steps[0], "pattern": {"Regex": r"\p{L}+|."}}
    assert make_cached(altered(pre_tokenizer={"type": "Sequence", "pretokenizers": [other, steps[1]]})) is None


def test_text_with_a_byte_outside_the_vocabulary_is_left_to_the_tokenizer() -> None:
    small = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = fast_tokenizer.CachedTokenizer(small, fast_tokenizer._PATTERNS[fast_tokenizer._GPT2], {})
    assert known.encode("ab") is not None
    assert known.encode("abc") is None


def test_the_word_cache_has_a_maximum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokenizer, "MAX_WORDS", 10)
    known = make_cached(tokenizer("gpt2"))
    assert known is not None
    text = " ".join(f"word{chr(97 + i)}" for i in range(26))
    assert known.encode(text)[0].tolist() == tokenizer("gpt2").encode(text, add_special_tokens=False).ids
    assert len(known._word_ids) <= 10
