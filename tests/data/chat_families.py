"""Sample chats, tokenizers of template families, and a readable display of the trained tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import EncodedDocument, Encoder

TEMPLATES = Path(__file__).parent / "templates"
# BOS token, EOS token and other special tokens of each family.
SPECIAL = {
    "smollm2": ("<|im_start|>", "<|im_end|>", ()),
    "qwen3": (None, "<|im_end|>", ("<|im_start|>",)),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]")),
    "mistral_v7": ("<s>", "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "gemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "chatml_marked": (None, "<|im_end|>", ("<|im_start|>",)),
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "add", "parameters": {}}}'
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

Family = Callable[[str], PreTrainedTokenizerBase]


@pytest.fixture(scope="session")
def family(tokenizer_dir: Path) -> Family:
    made: dict[str, PreTrainedTokenizerBase] = {}

    def load(name: str) -> PreTrainedTokenizerBase:
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
            begin, end, others = SPECIAL[name]
            texts = [text for text in (begin, end, *others) if text]
            tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
            tokenizer.bos_token, tokenizer.eos_token = begin, end
            if name != "smollm2":
                tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
                tokenizer.name_or_path = f"{name}.jinja"
            made[name] = tokenizer
        return made[name]

    return load


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


def answered(text: str) -> Message:
    return Message("tool", text, name="add", tool_call_id="call00001")


SINGLE = (user("Hi"), assistant("Hello."))
MULTI = (user("1+1?"), assistant("2"), user("And 2+2?"), assistant("4"))
SYSTEM = (system("Be brief."), *SINGLE)
TOOLS = (user("1+1?"), assistant("", tool_calls=(CALL,)), answered("2"), assistant("It is 2."))

REASONED_CALL = assistant("", tool_calls=(CALL,), reasoning_content="Add.")
CHATS = {"single": SINGLE, "multi": MULTI, "system": SYSTEM, "tools": TOOLS}


def chat(*messages: Message) -> Document:
    return Document("rows.jsonl:1", messages, (TOOL,) if any(message.tool_calls for message in messages) else ())


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, **settings: Any) -> EncodedDocument:
    encoder = Encoder(tokenizer, DataSection(sources=(Source(path="rows.jsonl"),), **settings))
    return encoder.encode([encoder.render(document)])[0]


def marked(tokenizer: PreTrainedTokenizerBase, encoded: EncodedDocument) -> str:
    """Decode token by token, with ⟦ ⟧ around runs of trained tokens."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(encoded.ids) + 1):
        if end == len(encoded.ids) or encoded.trained[end] != encoded.trained[start]:
            text = tokenizer.decode(encoded.ids[start:end])
            parts.append(f"⟦{text}⟧" if encoded.trained[start] else text)
            start = end
    return "".join(parts)
