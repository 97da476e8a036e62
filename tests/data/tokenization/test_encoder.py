"""Loss masks: the trained tokens, decoded, are exactly what the assistant must write."""

from __future__ import annotations

import itertools
import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import EncodedDocument, Encoder
from launcher.errors import DataError

END = "<|im_end|>"
ANY = DataSection(sources=(Source(path="rows.jsonl"),))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY_THINK_IN_LAST_TURN = CHATML.replace(
    "{{ BODY }}", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
REWRITES_HISTORY = CHATML.replace("BODY", "m.content if loop.last or m.role != 'assistant' else 'OK'")
DROPS_FIRST_TURN = CHATML.replace("for m in messages", "for m in messages[-3:]").replace("BODY", "m.content")
CHANGES_CONTENT = CHATML.replace("BODY", "m.content | upper")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def chat(*turns: tuple[str, str]) -> Document:
    return Document("rows.jsonl:1", tuple(Message(role, content) for role, content in turns))


def encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> EncodedDocument:
    encoder = Encoder(tokenizer, ANY)
    return encoder.encode([encoder.render(document)])[0]


def trained_texts(tokenizer: PreTrainedTokenizerBase, encoded: EncodedDocument) -> list[str]:
    runs = itertools.groupby(zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "Hi"), ("assistant", "Hello.")],
        [("user", "a"), ("assistant", "b"), ("user", "b"), ("assistant", "b"), ("user", "c"), ("assistant", "b again")],
        [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")],
        [("user", "Code"), ("assistant", "\n\ndef f():\n    return 1\n")],
        [("user", "Spaces"), ("assistant", "  two before, three after   ")],
        [("user", "日本語"), ("assistant", "こんにちは 🙂 — naïve 👩\u200d👩\u200d👧 é")],
        [("user", "nothing"), ("assistant", "")],
        [("user", "say assistant"), ("assistant", "assistant\n")],
        [("user", "one"), ("assistant", "two"), ("assistant", "three"), ("user", "unanswered")],
        [("user", "How do turns end?"), ("assistant", f"With {END} in this model."), ("user", "ok"), ("assistant", "Yes.")],
    ],
)
def test_the_assistants_text_and_its_end_are_trained(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> None:
    encoded = encode(tokenizer, chat(*turns))
    answers = [content + END for role, content in turns if role == "assistant"]
    assert trained_texts(tokenizer, encoded) == answers
    assert [tokenizer.decode([encoded.ids[i]]) for i in encoded.turn_ends] == [END] * len(answers)
    rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert tokenizer.decode(encoded.ids) == rendered


def test_the_prompt_is_tokenized_as_it_is_for_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    for answer in ("Hello.", "\nHello.", "  Hello.", "é", "assistant"):
        document = chat(("user", "Hi"), ("assistant", answer))
        encoded = encode(tokenizer, document)
        prompt = Encoder(tokenizer, ANY).prompt(document)
        assert prompt is not None
        text, prompt_ids, reference = prompt
        assert (text, reference) == ("Hi", answer)
        assert encoded.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert not encoded.trained[: len(prompt_ids)].any()
        assert encoded.trained[len(prompt_ids)] == 1


def test_text_that_the_template_puts_before_the_answer_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = EMPTY_THINK_IN_LAST_TURN
    for last in ("think", "", "fine"):
        encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "think"), ("user", "b"), ("assistant", last)))
        assert trained_texts(tokenizer, encoded) == [f"think{END}", f"<think>\n\n</think>\n\n{last}{END}"]


def test_a_space_before_the_end_of_turn_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = LLAMA_2
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert trained_texts(tokenizer, encoded) == [f" b {END}", f" d {END}"]


def test_without_an_end_of_turn_only_the_text_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = NO_END
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "one two"), ("user", "c"), ("assistant", "three")))
    assert trained_texts(tokenizer, encoded) == ["one two", "three"]
    assert encoded.turn_ends == ()


@pytest.mark.parametrize("template", [REWRITES_HISTORY, DROPS_FIRST_TURN, CHANGES_CONTENT])
def test_a_template_that_changes_a_message_is_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    document = chat(("user", "a"), ("assistant", "one"), ("user", "c"), ("assistant", "three"))
    with pytest.raises(DataError, match="chat template") as caught:
        encode(tokenizer, document)
    assert caught.value.problems[0].where.startswith("rows.jsonl:1")
    assert caught.value.problems[0].value == tokenizer.name_or_path


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = CHATML.replace("BODY", "m.content ~ (m.tool_calls or '')")
LISTS_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
WITH_TOOLS = Document(
    "rows.jsonl:1",
    (Message("user", "1+1?"), Message("assistant", "", (CALL,)), Message("tool", "2"), Message("assistant", "It is 2.")),
    ({"type": "function", "function": {"name": "add"}},),
)


def test_a_template_that_leaves_out_tool_results_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = LISTS_TOOLS + CALLING
    assert len(encode(tokenizer, WITH_TOOLS).turn_ends) == 2
    # The tool's answer also appears in the assistant's text, which must not count.
    tokenizer.chat_template = tokenizer.chat_template.replace("for m in messages", "for m in messages if m.role != 'tool'")
    with pytest.raises(DataError, match="leaves out what the tool answers") as caught:
        encode(tokenizer, WITH_TOOLS)
    problem = caught.value.problems[0]
    assert (problem.where, problem.value) == ("rows.jsonl:1, messages[2]", tokenizer.name_or_path)


@pytest.mark.parametrize(
    "written", ["m.tool_calls[0].function.name", "m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments.a"]
)
def test_a_template_that_leaves_out_arguments_of_a_call_is_refused(tokenizer: PreTrainedTokenizerBase, written: str) -> None:
    tokenizer.chat_template = LISTS_TOOLS + CHATML.replace("BODY", f"m.content ~ ({written} if m.tool_calls else '')")
    calling = Message("assistant", "", ({"function": {"name": "add", "arguments": {"a": 1, "b": {"c": 1}}}},))
    with pytest.raises(DataError, match="does not write the call of the tool add with all of its arguments") as caught:
        encode(tokenizer, Document("rows.jsonl:1", (WITH_TOOLS.messages[0], calling), WITH_TOOLS.tools))
    problem = caught.value.problems[0]
    assert (problem.where, problem.value) == ("rows.jsonl:1, messages[1]", tokenizer.name_or_path)
    assert "data.chat_template" in problem.remedy


def test_a_separate_tool_template_must_write_the_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": "other" + CALLING, "tool_use": LISTS_TOOLS + CALLING}
    assert len(encode(tokenizer, WITH_TOOLS).turn_ends) == 2
    tokenizer.chat_template = {"default": "other" + CALLING, "tool_use": CALLING}
    with pytest.raises(DataError, match="leaves out the definitions of the tools"):
        encode(tokenizer, WITH_TOOLS)


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode(tokenizer, chat(("user", "a"), ("assistant", "b")))


def test_a_special_token_may_include_the_line_break_after_it(tokenizer_dir: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.add_tokens(AddedToken("<|done|>", special=True, rstrip=True, normalized=False), special_tokens=True)
    tokenizer.chat_template = CHATML.replace(END, "<|done|>").replace("BODY", "m.content")
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert [text.strip() for text in trained_texts(tokenizer, encoded)] == ["b<|done|>", "d<|done|>"]
    assert [tokenizer.decode([encoded.ids[i]]) for i in encoded.turn_ends] == ["<|done|>"] * 2


def metaspace(scheme: str) -> PreTrainedTokenizerBase:
    """Return a small SentencePiece-style tokenizer, which attaches a space to the word after it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace("▁", scheme)
    special = ["<unk>", "<|im_start|>", END]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=list(string.printable), show_progress=False)
    backend.train_from_iterator(["the naive answer is two and the question is one plus one"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token="<unk>")
    made.chat_template = CHATML.replace("BODY", "m.content")
    return made


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_metaspace_tokenizer_has_exact_mask_boundaries(scheme: str) -> None:
    tokenizer = metaspace(scheme)
    turns = (("user", "one plus one"), ("assistant", "two  and"), ("user", " the"), ("assistant", " naive"))
    encoded = encode(tokenizer, chat(*turns))
    written = "".join(tokenizer.convert_ids_to_tokens(encoded.ids[encoded.trained == 1].tolist()))
    assert written == f"two▁▁and{END}▁naive{END}"
    encoded = encode(tokenizer, Document("x:1", prompt="one plus one:", text=" two"))
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.ids[encoded.trained == 1].tolist())) == f"▁two{END}"
    # Encoded alone, a completion that continues a word would start with a space.
    # After a prompt that ends with a space, the completion is a separate word.
    for prompt, completion in (("nai", "ve answer"), ("one plus one: ", "two")):
        encoded = encode(tokenizer, Document("x:1", prompt=prompt, text=completion))
        before, after = tokenizer(prompt).input_ids, encoded.ids[encoded.trained == 1].tolist()
        assert encoded.ids.tolist() == [*before, *after]
        assert "".join(tokenizer.convert_ids_to_tokens(after)) == completion.replace(" ", "▁") + END


def test_a_mask_boundary_inside_a_token_trains_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoded = encode(tokenizer, Document("x:1", prompt="nave\u0308", text=" answer"))
    assert (encoded.is_unsure, trained_texts(tokenizer, encoded)) == (False, [f" answer{END}"])
    # The accent combines with the last character of the prompt.
    encoded = encode(tokenizer, Document("x:1", prompt="na", text="\u0308ve answer"))
    assert encoded.is_unsure
    assert not encoded.trained.any()
    assert encoded.turn_ends == ()


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: 1+1?\nA:", " 2"), ("Q: 1+1?\nA: ", "2"), ("nai", "ve"), ("", "all"), ("q", "")]
)
def test_a_completion_and_its_end_token_are_trained(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> None:
    encoded = encode(tokenizer, Document("x:1", prompt=prompt, text=completion))
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, completion)]
    assert encoded.ids.tolist() == [*pieces[0], *pieces[1], tokenizer.eos_token_id]
    num_trained = len(pieces[1]) + 1 - (not prompt)
    assert encoded.trained.tolist() == [0] * (len(encoded.ids) - num_trained) + [1] * num_trained


def test_all_of_a_text_but_its_first_token_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(tokenizer, Document("x:1", text="Once upon a time."))
    assert tokenizer.decode(encoded.ids) == f"Once upon a time.{END}"
    assert encoded.trained.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_the_begin_token_is_added_where_the_tokenizer_adds_it(tokenizer_dir: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), bos_token="<|endoftext|>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    encoded = encode(tokenizer, Document("x:1", prompt="Q", text=" A"))
    assert tokenizer.decode(encoded.ids) == f"<|endoftext|>Q A{END}"
    assert trained_texts(tokenizer, encoded) == [f" A{END}"]
    assert tokenizer.decode(encode(tokenizer, Document("x:1", text="Q")).ids) == f"<|endoftext|>Q{END}"
