"""Loss masks of template families against hand-written expectations, with the trained parts in ⟦ ⟧."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from chat_families import (
    CALL,
    CHATS,
    MULTI,
    REASONED_CALL,
    SINGLE,
    SYSTEM,
    TEMPLATES,
    TOOL,
    TOOL_TEXT,
    TOOLS,
    Family,
    assistant,
    chat,
    encode,
    marked,
    system,
    user,
)
from transformers.utils import chat_template_utils

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.batch_encoder import cut_document
from launcher.data.tokenization.chat_template import ChatTemplate
from launcher.data.tokenization.encoder import EncodedDocument, Encoder
from launcher.errors import DataError

SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
V7 = "<s>[SYSTEM_PROMPT]"
NO_THOUGHT = "<think>\n\n</think>\n\n"

EXPECTED = {
    ("smollm2", "single"): f"{SMOL_SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n",
    ("smollm2", "multi"): (
        f"{SMOL_SYSTEM}<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n"
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
    ),
    ("smollm2", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    ),
    ("qwen3", "single"): f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦{NO_THOUGHT}Hello.<|im_end|>⟧\n",
    ("qwen3", "multi"): (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n"
        f"<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n⟦{NO_THOUGHT}4<|im_end|>⟧\n"
    ),
    ("qwen3", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{NO_THOUGHT}Hello.<|im_end|>⟧\n"
    ),
    ("qwen3", "tools"): (
        f"<|im_start|>system\n# Tools\n<tools>\n{TOOL_TEXT}\n</tools><|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n⟦{NO_THOUGHT}It is 2.<|im_end|>⟧\n"
    ),
    ("llama3", "single"): f"{LLAMA}<|eot_id|>{LLAMA_USER}Hi<|eot_id|>{LLAMA_ASSISTANT}⟦Hello.<|eot_id|>⟧",
    ("llama3", "multi"): (
        f"{LLAMA}<|eot_id|>{LLAMA_USER}1+1?<|eot_id|>{LLAMA_ASSISTANT}⟦2<|eot_id|>⟧"
        f"{LLAMA_USER}And 2+2?<|eot_id|>{LLAMA_ASSISTANT}⟦4<|eot_id|>⟧"
    ),
    ("llama3", "system"): f"{LLAMA}Be brief.<|eot_id|>{LLAMA_USER}Hi<|eot_id|>{LLAMA_ASSISTANT}⟦Hello.<|eot_id|>⟧",
    ("llama3", "tools"): (
        f"{LLAMA}<|eot_id|>{LLAMA_USER}Answer with a call of one of these functions:\n\n{TOOL_TEXT}\n\n1+1?<|eot_id|>"
        f'{LLAMA_ASSISTANT}⟦{{"name": "add", "parameters": {{"a": 1}}}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        f"{LLAMA_ASSISTANT}⟦It is 2.<|eot_id|>⟧"
    ),
    ("mistral", "single"): "<s>[INST] Hi[/INST]⟦ Hello.</s>⟧",
    ("mistral", "multi"): "<s>[INST] 1+1?[/INST]⟦ 2</s>⟧[INST] And 2+2?[/INST]⟦ 4</s>⟧",
    ("mistral", "tools"): (
        f"<s>[AVAILABLE_TOOLS] [{TOOL_TEXT}][/AVAILABLE_TOOLS][INST] 1+1?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]</s>⟧'
        '[TOOL_RESULTS] {"content": "2", "call_id": "call00001"}[/TOOL_RESULTS]⟦ It is 2.</s>⟧'
    ),
    ("mistral_v7", "single"): f"{V7}You are Mistral Small 3.[/SYSTEM_PROMPT][INST]Hi[/INST]⟦Hello.</s>⟧",
    ("mistral_v7", "multi"): (
        f"{V7}You are Mistral Small 3.[/SYSTEM_PROMPT][INST]1+1?[/INST]⟦2</s>⟧[INST]And 2+2?[/INST]⟦4</s>⟧"
    ),
    ("mistral_v7", "system"): f"{V7}Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]⟦Hello.</s>⟧",
    ("gemma", "single"): "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n",
    ("gemma", "multi"): (
        "<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n⟦2<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd 2+2?<end_of_turn>\n<start_of_turn>model\n⟦4<end_of_turn>⟧\n"
    ),
    ("gemma", "system"): (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
    ),
    ("chatml_marked", "multi"): (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>\n⟧"
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>\n⟧"
    ),
    ("chatml_marked", "tools"): (
        f"<|im_start|>tools\n[{TOOL_TEXT}]<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n⟧'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n⟦It is 2.<|im_end|>\n⟧"
    ),
}


@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_the_mask_covers_the_assistants_answers_and_their_ends(family: Family, name: str, kind: str) -> None:
    tokenizer = family(name)
    expected, messages = EXPECTED[name, kind], CHATS[kind]
    encoded = encode(tokenizer, chat(*messages))
    assert marked(tokenizer, encoded) == expected
    num_answers = sum(message.role == "assistant" for message in messages)
    ends = {token for token in tokenizer.decode(encoded.ids[list(encoded.turn_ends)]).split(">") if token}
    assert len(encoded.turn_ends) == num_answers == expected.count("⟦")
    assert len(ends) == 1
    assert all(encoded.trained[list(encoded.turn_ends)])


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral", "mistral_v7", "gemma"])
def test_the_text_is_what_the_tokenizer_itself_makes_of_the_chat(
    family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family(name)
    messages = (user("1+1?"), assistant("", tool_calls=(CALL,), reasoning_content="Add."), *TOOLS[2:])
    messages = MULTI if name == "gemma" else (system("Be brief."), *MULTI) if name == "mistral_v7" else messages
    document = chat(*messages)
    rows = [
        {"role": m.role, "content": m.content}
        | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        | ({"reasoning_content": m.reasoning_content} if m.reasoning_content else {})
        | ({"tool_call_id": m.tool_call_id} if m.tool_call_id else {})
        for m in messages
    ]
    compiled = chat_template_utils._compile_jinja_template(tokenizer.chat_template)
    monkeypatch.setitem(compiled.globals, "strftime_now", datetime(2024, 7, 26).strftime)
    for settings in ({}, {"add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(rows, tools=list(document.tools) or None, tokenize=False, **settings)
        assert ChatTemplate(tokenizer).render(document, generation_prompt=bool(settings)) == expected


@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_truncation_removes_only_the_end_of_tokens_and_mask(family: Family, name: str, kind: str) -> None:
    tokenizer = family(name)
    encoded = encode(tokenizer, chat(*CHATS[kind]))
    for length in range(1, len(encoded.ids) + 1):
        (piece,) = cut_document(encoded, length, "truncate")
        assert piece.ids.tolist() == encoded.ids[:length].tolist()
        assert piece.trained.tolist() == encoded.trained[:length].tolist()
    cut = encoded.turn_ends[-1]
    (piece,) = cut_document(encoded, cut, "truncate")
    shown = marked(tokenizer, EncodedDocument(piece.ids, piece.trained, ()))
    expected = EXPECTED[name, kind]
    assert shown == expected[: expected.rindex(tokenizer.decode([encoded.ids[cut]]))] + "⟧"
    assert shown.endswith(f"{CHATS[kind][-1].content}⟧")


def test_last_turn_trains_only_the_last_turn(family: Family) -> None:
    qwen = family("qwen3")
    expected = EXPECTED["qwen3", "multi"].replace("⟦2<|im_end|>⟧", "2<|im_end|>")
    assert marked(qwen, encode(qwen, chat(*MULTI), train_on="last_turn")) == expected
    # A tool call and the answer after it form one turn.
    assert marked(qwen, encode(qwen, chat(*TOOLS), train_on="last_turn")) == EXPECTED["qwen3", "tools"]
    gemma = family("gemma")
    unanswered = encode(gemma, chat(*MULTI, user("Why?")), train_on="last_turn")
    assert not unanswered.trained.any()


def test_all_tokens(family: Family) -> None:
    gemma = family("gemma")
    encoded = encode(gemma, chat(*SINGLE), train_on="all")
    text = EXPECTED["gemma", "single"].replace("⟦", "").replace("⟧", "")
    # The first token has no context to be predicted from.
    assert marked(gemma, encoded) == text.replace("<bos>", "<bos>⟦") + "⟧"
    assert gemma.decode(encoded.ids[list(encoded.turn_ends)]) == "<end_of_turn>"


@pytest.mark.parametrize("name", ["gemma", "chatml_marked"])
def test_a_messages_weight_overrides_the_setting(family: Family, name: str) -> None:
    tokenizer = family(name)
    weighted = (user("1+1?"), assistant("2", weight=0), user("And 2+2?"), assistant("4", weight=1))
    first, last = (part for part in EXPECTED[name, "multi"].split("⟦")[1:])
    skipped = EXPECTED[name, "multi"].replace(f"⟦{first}", first.replace("⟧", ""))
    assert marked(tokenizer, encode(tokenizer, chat(*weighted))) == skipped
    assert marked(tokenizer, encode(tokenizer, chat(*weighted), train_on="last_turn")) == skipped
    every = marked(tokenizer, encode(tokenizer, chat(*weighted), train_on="all"))
    plain = EXPECTED[name, "multi"].replace("⟦", "").replace("⟧", "")
    assert every.replace("⟦", "").replace("⟧", "") == plain
    assert f"⟧{first.split('⟧')[0]}⟦" in every
    assert f"{last.split('⟧')[0]}" in every.rpartition("⟦")[2]
    early = (user("1+1?"), assistant("2", weight=1), *MULTI[2:])
    assert marked(tokenizer, encode(tokenizer, chat(*early), train_on="last_turn")) == EXPECTED[name, "multi"]


def test_the_system_text_of_the_settings_replaces_the_rows_own(family: Family) -> None:
    tokenizer = family("smollm2")
    expected = EXPECTED["smollm2", "system"].replace("Be brief.", "Be kind.\nAlways.")
    for messages in (SINGLE, SYSTEM):
        assert marked(tokenizer, encode(tokenizer, chat(*messages), system="Be kind.\nAlways.")) == expected


def test_a_template_file_replaces_the_tokenizers_template(family: Family, tmp_path: Path) -> None:
    tokenizer = family("smollm2")
    file = TEMPLATES / "chatml_marked.jinja"
    assert marked(tokenizer, encode(tokenizer, chat(*MULTI), chat_template=str(file))) == EXPECTED["chatml_marked", "multi"]
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('never') }}")
    with pytest.raises(DataError, match="never") as caught:
        encode(tokenizer, chat(*MULTI), chat_template=str(refusing))
    assert caught.value.problems[0].value == str(refusing)
    with pytest.raises(DataError, match="template cannot be read"):
        encode(tokenizer, chat(*MULTI), chat_template=str(tmp_path / "missing.jinja"))


def test_reasoning_is_trained_where_the_template_writes_it(family: Family) -> None:
    tokenizer = family("qwen3")
    thinking = (
        user("1+1?"),
        assistant("2", reasoning_content="One and one."),
        user("And 2+2?"),
        assistant("4", reasoning_content="Two twos."),
    )
    assert marked(tokenizer, encode(tokenizer, chat(*thinking))) == EXPECTED["qwen3", "multi"].replace(
        NO_THOUGHT, "<think>\nTwo twos.\n</think>\n\n"
    )


def test_reasoning_that_the_template_leaves_out_is_refused_in_the_last_turn(family: Family) -> None:
    earlier = (user("1+1?"), assistant("2", reasoning_content="One and one."), *MULTI[2:])
    smol, marks = family("smollm2"), family("chatml_marked")
    assert marked(smol, encode(smol, chat(*earlier))) == EXPECTED["smollm2", "multi"]
    for tokenizer in (smol, marks):
        for train_on in ("assistant", "last_turn", "all"):
            with pytest.raises(DataError, match="leaves out or changes the assistant's reasoning") as caught:
                # The question contains the reasoning text, which must not count.
                encode(tokenizer, chat(user("Add? Add."), assistant("4", reasoning_content=" Add.\n")), train_on=train_on)
            problem = caught.value.problems[0]
            assert (problem.where, problem.value) == ("rows.jsonl:1, messages[1]", tokenizer.name_or_path)
            assert "data.chat_template" in problem.remedy
    assert encode(smol, chat(user("Hi"), assistant("Hello.", reasoning_content="Hi.", weight=0))).trained.sum() == 0


def test_ambiguous_prefixes_are_refused_except_for_the_last_turn(family: Family) -> None:
    qwen = family("qwen3")
    # The template writes the reasoning of a tool call only until another question follows.
    messages = (TOOLS[0], REASONED_CALL, *TOOLS[2:], *MULTI)
    with pytest.raises(DataError, match="renders earlier messages differently") as caught:
        encode(qwen, chat(*messages))
    problem = caught.value.problems[0]
    assert (problem.where, problem.value) == ("rows.jsonl:1, messages[3]", "qwen3.jinja")
    assert "data.train_on=last_turn" in problem.remedy
    shown = marked(qwen, encode(qwen, chat(*messages), train_on="last_turn"))
    assert shown.endswith(f"⟦{NO_THOUGHT}4<|im_end|>⟧\n")
    assert shown.count("⟦") == 1


def test_a_template_that_leaves_out_a_message_is_refused(family: Family) -> None:
    # Mistral's template puts the system text into the last question, and omits it once that is answered.
    for name, kind, words in (
        ("mistral", SYSTEM, "leaves out or changes what the system says"),
        ("mistral", (system("Be brief."), *MULTI), "leaves out or changes what the system says"),
        ("smollm2", TOOLS, "leaves out the definitions of the tools"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            encode(family(name), chat(*kind))
        assert caught.value.problems[0].where.startswith("rows.jsonl:1")
        assert "data.chat_template" in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("gemma", TOOLS, "Conversation roles must alternate"),
        ("mistral", (TOOLS[0], assistant("", tool_calls=({**CALL, "id": "1"},))), "nine letters and digits"),
        ("llama3", (TOOLS[0], assistant("", tool_calls=(CALL, CALL))), "one tool call at a time"),
        ("smollm2", (TOOLS[0], assistant("", tool_calls=(CALL,))), "does not write the call of the tool add"),
        ("llama3", (TOOLS[0], assistant("I add.", tool_calls=(CALL,))), "changes the message"),
    ],
)
def test_a_conversation_that_the_template_rejects_is_refused(
    family: Family, name: str, messages: tuple[Message, ...], words: str
) -> None:
    document = Document("rows.jsonl:1", messages, () if name == "smollm2" else (TOOL,))
    with pytest.raises(DataError, match=words) as caught:
        encode(family(name), document)
    assert caught.value.problems[0].value == family(name).name_or_path
    assert caught.value.problems[0].where.startswith("rows.jsonl:1")


# Generation marks, which are checked against the assistant's messages


MARKS_NO_END = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TWO_MARKS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %} -> {% generation %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


MARKED = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
CALLS = "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
# The tool definitions, then each message as its role and BODY.
EACH = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:BODY{% endfor %}"
ONE_MARK = "{% generation %}" + EACH.replace("BODY", "{{ m.content }}") + "{% endgeneration %}"
CALLS_UNMARKED = (
    f"{{% if m.tool_calls %}}{CALLS}{{% elif m.role == 'assistant' %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
)
FIRST = MARKED.replace("m.content", "messages[0].content")
OTHER = "marks text that is not the assistant's as generated"
# The marked part begins after BEFORE.
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}BEFORE{% generation %}HEADER{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
    "{% if not loop.last %}<|im_start|>user\n{% endif %}{% endgeneration %}"
    "{% else %}{% if loop.first %}<|im_start|>user\n{% endif %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OUTSIDE = "marks text that the assistant does not say as generated"
ECHO = (user("Say yes."), assistant("yes"), user("Say no."), assistant("no"))


@pytest.mark.parametrize(
    ("template", "messages", "words", "place"),
    [
        (EACH.replace("BODY", MARKED), SINGLE, OUTSIDE, "rows.jsonl:1"),
        (EACH.replace("BODY", MARKED), MULTI, OUTSIDE, "rows.jsonl:1"),
        (EACH.replace("BODY", MARKED), (*SINGLE, assistant("And?")), OUTSIDE, "rows.jsonl:1"),
        (
            EACH.replace("BODY", "{{ m.content }}{% if m.role == 'assistant' %}" + FIRST + "{% endif %}"),
            SINGLE,
            OTHER,
            "messages[1]",
        ),
        # There are as many marks as answers, and each contains an answer.
        (ONE_MARK, SINGLE, "marks what the user says", "messages[0]"),
        (
            EACH.replace("BODY", f"{{% if m.role == 'user' %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"),
            ECHO,
            "marks what the user says",
            "messages[0]",
        ),
        (
            EACH.replace("BODY", "{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"),
            SINGLE,
            OUTSIDE,
            "rows.jsonl:1",
        ),
        (
            CHATML.replace("BEFORE", "").replace("HEADER", "<|im_start|>assistant\n"),
            MULTI,
            "marks the header of the assistant's turn",
            "messages[1]",
        ),
        (CHATML.replace("BEFORE", "<|im_start|>").replace("HEADER", "assistant\n"), SINGLE, "marks the header", "messages[1]"),
        (NEXT_HEADER, MULTI, "marks text after the assistant's end of turn", "messages[1]"),
        (EACH.replace("BODY", CALLS_UNMARKED), TOOLS, "does not mark what the assistant says here", "messages[1]"),
        (
            EACH.replace(
                "BODY",
                "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
                "<|im_end|>{% endgeneration %}{{ m.tool_calls | tojson if m.tool_calls }}{% else %}{{ m.content }}{% endif %}",
            ),
            TOOLS,
            "marks only a part",
            "messages[1]",
        ),
    ],
)
def test_generation_marks_around_other_text_are_refused(
    family: Family, tmp_path: Path, template: str, messages: tuple[Message, ...], words: str, place: str
) -> None:
    file = tmp_path / "marks.jinja"
    file.write_text(template)
    with pytest.raises(DataError, match=words) as caught:
        encode(family("chatml_marked"), chat(*messages), chat_template=str(file))
    problem = caught.value.problems[0]
    assert problem.value == str(file)
    assert problem.where.endswith(place)
    assert "generation marks" in problem.remedy


def test_an_untrained_turn_needs_no_generation_marks(family: Family, tmp_path: Path) -> None:
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    answer = f"{{% if m.role == 'assistant' and loop.last %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    file.write_text(EACH.replace("BODY", answer))
    settings = {"chat_template": str(file)}
    expected = "nulluser:1+1?assistant:2user:And 2+2?assistant:⟦4<|im_end|>⟧"
    assert marked(tokenizer, encode(tokenizer, chat(*MULTI), train_on="last_turn", **settings)) == expected
    first_left_out = (MULTI[0], assistant("2", weight=0), *MULTI[2:])
    assert marked(tokenizer, encode(tokenizer, chat(*first_left_out), **settings)) == expected
    with pytest.raises(DataError, match="marks other parts of a message once a later one follows"):
        encode(tokenizer, chat(*MULTI), **settings)


def test_generation_marks_are_the_trained_spans(family: Family, tmp_path: Path) -> None:
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    file.write_text(MARKS_NO_END)
    encoded = encode(tokenizer, chat(*SINGLE), chat_template=str(file))
    assert marked(tokenizer, encoded) == "user:Hiassistant:⟦Hello.⟧<|im_end|>"
    assert encoded.turn_ends == ()
    file.write_text(TWO_MARKS)
    encoded = encode(tokenizer, chat(*MULTI), chat_template=str(file), train_on="last_turn")
    assert marked(tokenizer, encoded) == "user:1+1?assistant:2 -> <|im_end|>user:And 2+2?assistant:⟦4⟧ -> ⟦<|im_end|>⟧"
    assert len(encoded.turn_ends) == 1


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_marks_may_cover_reasoning_that_the_template_writes(family: Family, tmp_path: Path, opened: str) -> None:
    """The generation prompt may also open the reasoning."""
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    written = CHATML.replace("BEFORE", "<|im_start|>assistant\n").replace("HEADER", "<think>\n\n</think>\n\n")
    file.write_text(written.replace("<|im_start|>assistant\n{% endif %}", f"<|im_start|>assistant\n{opened}{{% endif %}}"))
    shown = marked(tokenizer, encode(tokenizer, chat(*MULTI), chat_template=str(file)))
    assert shown.count("<|im_start|>assistant\n⟦<think>\n\n</think>\n\n") == 2
    assert shown.count("<|im_end|>⟧") == 2


def test_control_tokens_that_the_tokenizer_splits_are_named(family: Family) -> None:
    template = TEMPLATES / "llama3.jinja"
    with pytest.raises(DataError, match=r"ends the assistant's turn with <\|eot_id\|>, which is not a token of this tokenizer"):
        encode(family("chatml_marked"), chat(*SINGLE), chat_template=str(template))
    encoder = Encoder(
        family("chatml_marked"), DataSection(sources=(Source(path="a"),), chat_template=str(TEMPLATES / "mistral.jinja"))
    )
    assert {"[INST]", "[/INST]"} <= set(encoder.split_tokens)
    assert Encoder(family("llama3"), DataSection(sources=(Source(path="a"),))).split_tokens == ()
