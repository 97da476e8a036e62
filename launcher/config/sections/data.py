"""The settings of the data: sources, tokenization into rows, and checks."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from launcher.config.sections.fields import (
    Flag,
    Group,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    SettingsSection,
    Text,
    with_own_names,
)
from launcher.security.redaction import IN_QUERY

# The keys that a column mapping may use, which are the keys that the formats read.
COLUMNS = (
    *("messages", "conversations", "tools", "system"),
    *("instruction", "input", "output", "history"),
    *("prompt", "completion", "question", "answer", "text"),
)
# The paths of the data sets that are part of the launcher.
STDLIB_DOCS, GENERAL_TEXT = "builtin:stdlib_docs", "builtin:general_text"
COLUMNS_EXAMPLE = (
    "'data.sources=[{name: train, path: PATH, columns: {prompt: question, completion: answer}}]', "
    "with the rows' own keys after the colons"
)

_USER = re.compile(r"(\w+)://([^/?]*)@")
# Their URLs contain container@account.
_AZURE = ("abfs", "abfss", "wasb", "wasbs", "az")

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Choice = Literal["keep", "drop", "fail"]
Accepted = Literal["keep", "fail"]


def without_credentials(path: str) -> str:
    """Return the path; refuse a URL with credentials, because plans and logs contain it."""
    if any(":" in user or protocol not in _AZURE for protocol, user in _USER.findall(path)):
        raise ValueError("contains a user or a password; remove them: storage libraries read them from the environment")
    if "://" in path and (match := IN_QUERY.search(path)):
        raise ValueError(
            f"contains a key or a signature ({match['name']}), which would be written into plans; write the storage's own URL "
            "(s3://, gs://, abfs://) with credentials in the environment, or download the file and use the copy"
        )
    return path


RowPath = Annotated[Text, AfterValidator(without_credentials)]


class RowSource(SettingsSection):
    """Where rows come from, and how they are read."""

    name: Name = Field("train", description="Name of the source in reports and metrics.")
    path: RowPath = Field(
        description=(
            "A file (.jsonl, .json, .csv, .parquet or .txt, each also as .gz or .zst), a folder or a pattern (./data/*.jsonl); a "
            f"hub dataset as owner/name; a storage URL, such as s3://bucket/rows.jsonl or hf://datasets/o/n; or {STDLIB_DOCS}. "
            f"{GENERAL_TEXT} is for evaluation only."
        )
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"] = Field(
        "auto",
        description=(
            "messages: a list of {role, content}, as in OpenAI's fine-tuning files; sharegpt: conversations of {from, value}; "
            "alpaca: instruction, input and output; prompt_completion: prompt and completion, as texts or lists of messages; "
            "question_answer: question and answer; text: every token is trained (each line of a .txt file is a document). auto: "
            "chosen by the keys of each row."
        ),
    )
    completions: Literal["auto", "chat", "text"] = Field(
        "auto",
        description=(
            "How a prompt and its completion, or a question and its answer, are written. chat: as a user message and an "
            "assistant answer, in the chat template; text: one after the other, unchanged. auto: chat if the tokenizer has a "
            "chat template (or data.chat_template is set), except for prompts that contain the tokenizer's special tokens."
        ),
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description=(
            f"Maps each column that the format reads ({', '.join(COLUMNS)}) to the rows' own key. Dots reach into an object, as "
            f"in data.question. Set the whole list: {COLUMNS_EXAMPLE}."
        ),
    )
    ignored_keys: tuple[Text, ...] = Field(
        (),
        description=(
            "Row keys to ignore. Without it, rows made for another kind of training (images, label: false) are refused."
        ),
    )
    split: Text | None = Field(None, description="Split of a hub dataset. Unset: train, or the only split.")
    subset: Text | None = Field(
        None, description="Configuration of a hub dataset that has several, such as main. Unset: the dataset's default."
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit of a hub dataset; a 40-digit commit never changes. Unset: the default branch."
    )

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value if name not in COLUMNS]:
            raise ValueError(
                f"has no column {', '.join(unknown)}; the columns are {', '.join(COLUMNS)}; such as {COLUMNS_EXAMPLE}"
            )
        return value


class Source(RowSource):
    """One data source, and its share of the mixture."""

    weight: NonNegative | None = Field(
        None,
        description=(
            "Share of the mixture's tokens, relative to the other sources' weights. A source of weight 0 is not read, and none "
            "of its documents are held out. Unset: all of its documents."
        ),
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Maximum tokens taken from the source per epoch; every epoch uses the same documents. Unset: all."
    )
    epochs: Positive = Field(
        1.0,
        description=(
            "How often each document of the source is used in one epoch of the run; 0.5 uses half of the documents, the same "
            "half in every epoch."
        ),
    )

    @property
    def is_read(self) -> bool:
        """False for a source of weight 0, which neither training nor evaluation uses."""
        return self.weight != 0


class ChecksSection(SettingsSection):
    """What happens to documents that a check finds: keep them, drop them, or fail before anything is submitted."""

    bad_rows: Literal["drop", "fail"] = Field(
        "fail",
        description=(
            "A row cannot be used: it is not JSON, lacks a key, or has a value of the wrong type. fail: report all such rows and "
            "refuse the run. drop: leave them out and count them; more than 5% of the rows refuse the run unless dropped=keep. A "
            "file that cannot be read is always refused."
        ),
    )
    empty_answer: Choice = Field("drop", description="A trained answer is empty or white space.")
    exact_duplicate: Choice = Field(
        "keep", description="A training document repeats an earlier one, ignoring case, white space and punctuation."
    )
    near_duplicate: Choice = Field("keep", description="A document is nearly identical to an earlier one in the training split.")
    held_out_in_train: Choice = Field(
        "fail",
        description=(
            "A held-out document is also in training, ignoring case, white space and punctuation. drop: remove it from training. "
            "fail: refuse the run if more than 1% of the held-out documents are."
        ),
    )
    held_out_prompt_in_train: Choice = Field(
        "keep",
        description=(
            "The prompt of a held-out document (the text before its first answer) is also in training, with another answer; drop "
            "removes the training documents with that prompt."
        ),
    )
    near_held_out_in_train: Choice = Field(
        "keep",
        description=(
            "A held-out document is nearly identical to a training document, which drop removes; common in templated rows."
        ),
    )
    truncated: Accepted = Field(
        "fail",
        description=(
            "Tokens of a document are cut off because it is longer than a row. fail: refuse the run above 20% of the documents."
        ),
    )
    dropped: Accepted = Field(
        "fail",
        description=(
            "A document is left out: it is longer than a row (data.long_documents=drop), or a check drops it. Duplicates, and "
            "documents that resemble held-out ones, do not count. fail: refuse the run above 20% of the documents."
        ),
    )
    broken_encoding: Choice = Field(
        "keep", description="Text was decoded wrongly: replacement characters, UTF-8 read as Latin-1."
    )
    repetitive_answer: Choice = Field("keep", description="An answer repeats itself.")
    secrets: Choice = Field("keep", description="Text that looks like a key, token or password.")
    personal_data: Choice = Field("keep", description="Text that looks like an e-mail address or a telephone number.")
    role_order: Choice = Field(
        "keep", description="Two consecutive messages have the same role, or the last message is the user's."
    )
    special_token_in_text: Choice = Field(
        "keep", description="The text contains a special token of this tokenizer or of another model."
    )
    no_turn_end: Choice = Field(
        "fail",
        description=(
            "A document trains no end of turn. drop: leave it out. fail: refuse the run if this affects more than half of a "
            "source's trained documents, because the model might never stop."
        ),
    )
    no_trained_token: Choice = Field(
        "drop",
        description=(
            "A document has no trained token within a row's length. drop: leave it out, and refuse the run if a whole source has "
            "none. Data without any trained token is always refused."
        ),
    )


class DataSection(SettingsSection):
    """The training data and how it becomes rows of tokens."""

    name: Name = Field("data", description="Short name; part of the run's default name.")
    path: RowPath | None = Field(
        None,
        description="Path that data=jsonl reads; shorthand for a data.sources list with one entry. Set one or the other.",
    )
    sources: Annotated[tuple[Source, ...], with_own_names("source")] = Field(
        min_length=1, description="The sources of the mixture."
    )
    max_length: Annotated[int, Field(ge=16, strict=True)] = Field(1024, description="Tokens per row.")
    packing: Flag = Field(
        True,
        description=(
            "Fill each row with several documents, which do not attend to each other. false: one document per row, in batches of "
            "rows of about the same length."
        ),
    )
    long_documents: Literal["truncate", "split", "drop"] = Field(
        "truncate",
        description="What happens to documents longer than a row: truncate them, split them over several rows, or drop them.",
    )
    train_on: Literal["assistant", "last_turn", "all"] = Field(
        "assistant",
        description=(
            "Trained tokens of chats. assistant: the assistant's turns with their ends (a message's own weight, 0 or 1, takes "
            "precedence); last_turn: only those of the last turn; all: all tokens."
        ),
    )
    system: str | None = Field(
        None, description="System message of every chat, in place of the chat's own. Unset: each chat keeps its own."
    )
    chat_template: Text | None = Field(
        None,
        description=(
            "File with a Jinja chat template that replaces the tokenizer's, also in the exported folder. Unset: the tokenizer's "
            "own."
        ),
    )
    eval_fraction: Share = Field(
        0.0,
        description=(
            "Share of the documents held out for evaluation; ignored for a source that has its own held-out split. Documents "
            "with the same prompt (the text before the first answer) stay in one split; a prompt shared by very many documents "
            "counts as an instruction, and its documents are divided one by one."
        ),
    )
    eval_path: RowPath | None = Field(
        None, description="Path of held-out documents, in the forms of sources[].path and the sources' format."
    )
    eval_split: Text | None = Field(
        None, description="Split of a hub dataset or folder in data.eval_path. Unset: validation, else test."
    )
    eval_max_rows: PositiveInt | None = Field(None, description="Evaluate on at most this many held-out rows. Unset: all.")
    exclude: Text | None = Field(
        None,
        description=(
            "File that lists documents to leave out of training, as written by `launcher data --scored RUN --exclude FILE`: one "
            'line {"content": ID} per document. An ID stands for a text wherever it occurs, ignoring case, white space and '
            "punctuation."
        ),
    )
    workers: PositiveInt | None = Field(
        None, description="Processes that build the data cache. Unset: one per CPU that this process may use."
    )
    cache_group: Group | None = Field(
        None,
        description=(
            "Group of this machine whose members share finished data caches, in the folder that the environment variable "
            "LAUNCHER_SHARED_CACHE must name. Every member can decide what the others train on. Unset: read caches of this user "
            "and of root."
        ),
    )
    checks: ChecksSection = Field(default_factory=ChecksSection, description="What happens to documents that a check finds.")

    @model_validator(mode="after")
    def _check_sources(self) -> DataSection:
        if self.eval_fraction and self.eval_path:
            raise ValueError("data.eval_fraction and data.eval_path exclude each other; set one of them")
        if self.path is not None and all(source.path != self.path for source in self.sources):
            raise ValueError(
                "data.path and data.sources are both set, and no entry of data.sources has this path; remove one of them: "
                "data.path is short for a list with one entry"
            )
        if all(source.weight == 0 for source in self.sources):
            raise ValueError("data.sources: the weights of the mixture sum to zero; give at least one source a weight above 0")
        return self
