"""Inspects the data and the model of a run that is being set up: `python -m launcher.worker.data_sample < CONFIG.json`.

Prints one JSON object: each source's number of rows, whether all are plain text, document lengths in tokens (estimated from
characters without the model's tokenizer), and the config.json of a model on the Hub. Writes only the conversion of a GGUF file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from launcher.child_process import exit_on_termination
from launcher.config.schema import RunConfig
from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import is_run
from launcher.data.cache_dir import download_cache
from launcher.data.sources.documents import Document
from launcher.data.sources.files import Block
from launcher.data.sources.reading import count_rows, list_usable, read_batches
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.errors import LauncherError
from launcher.model_folders import convert_local, hub_reason
from launcher.models import parent_run
from launcher.models.found_model import find_model
from launcher.security.redaction import printable_output

# Documents whose tokens are counted, spread over the source.
_NUM_SAMPLED = 2000
# The first rows of a source are all parsed, which takes seconds; later rows are parsed only if their document is sampled.
_NUM_CHECKED = 100_000
# For English text and tokenizers of 50,000 to 150,000 entries. Chat templates add some tokens.
_CHARACTERS_PER_TOKEN = 3.5
_TOKENIZER_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "*.model"]


def sample_data(config: RunConfig) -> dict[str, Any]:
    """Return the JSON object that the module docstring describes."""
    row_sources = []
    documents: list[Document] = []
    for source in config.data.sources:
        if source.is_read:
            sampled, num_rows = _sample_rows(source, count_rows(source), config.data.checks)
            row_sources.append({"name": source.name, "path": source.path, "num_rows": num_rows})
            documents += sampled
    with tempfile.TemporaryDirectory() as fetched:
        folder, model_config, note = _find_tokenizer(config, Path(fetched))
        lengths, problem = _count_tokens(documents, config.data, folder)
    lengths.sort()
    return {
        "sources": row_sources,
        "is_text": not any(document.messages or document.prompt for document in documents),
        "num_sampled": len(lengths),
        "is_measured": not (note or problem),
        "mean": sum(lengths) / max(1, len(lengths)),
        **{f"p{percent}": lengths[len(lengths) * percent // 100] for percent in (50, 90, 99)},
        "longest": lengths[-1],
        "config": model_config,
        "note": note or problem,
    }


def _sample_rows(source: Source, upper_bound: int, checks: ChecksSection) -> tuple[list[Document], int]:
    """Return documents from all parts of a source, and the number of its rows."""
    # Batches are parsed as a whole; taking every step-th batch spreads the documents over the files.
    step = max(1, upper_bound // _NUM_SAMPLED)
    kept: list[Document] = []
    num_rows = 0
    for number, batch in enumerate(read_batches(source)):
        usable = list_usable(batch, checks)
        if number % step == 0 and len(kept) < _NUM_SAMPLED:
            kept += [document for document, _ in usable][: _NUM_SAMPLED - len(kept)]
        elif num_rows < _NUM_CHECKED:
            deque(usable, maxlen=0)
        rows = batch.rows.data if isinstance(batch.rows, Block) else batch.rows
        if isinstance(rows, bytes):
            # The rows of a table would have to be read.
            is_table = isinstance(batch.rows, Block) and batch.rows.kind == "parquet"
            num_rows += upper_bound if is_table else sum(1 for line in rows.splitlines() if line.strip())
        else:
            num_rows += len(rows)
    return kept, min(num_rows, upper_bound)


def _find_tokenizer(config: RunConfig, fetched: Path) -> tuple[Path | None, dict[str, Any] | None, str]:
    """Return the tokenizer's folder, config.json if only the Hub has it, and a note on what is missing here.

    `fetched` is an empty folder for files from the Hub: the Hub's cache would treat them as a complete model.
    """
    model = config.model
    name = model.tokenizer or model.path or ""
    while is_run(name) and find_model(model).tokenizer is None:
        # The parent's weights are copied when the run is prepared. Its tokenizer is that of the model it started from.
        model = parent_run.find_parent(name).plan.config.model
        name = model.tokenizer or model.path or ""
    convert_local(name, model)
    folder = find_model(model).tokenizer
    if folder is not None or not HUB_ID_PATTERN.fullmatch(name):
        return folder, None, "" if folder is not None else f"{name} is not on this machine"
    from huggingface_hub import snapshot_download

    revision = model.revision if name == model.path else None
    try:
        cache = download_cache()
        snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=_TOKENIZER_FILES, local_dir=fetched, etag_timeout=5
        )
    # The client raises many types of exceptions.
    except Exception as error:
        return None, None, f"{name} is not on this machine, and {hub_reason(error)}"
    file = fetched / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and name == config.model.path else None
    return fetched, content, ""


def _count_tokens(documents: list[Document], data: DataSection, folder: Path | None) -> tuple[list[int], str]:
    """Return the numbers of tokens, and why the tokenizer could not count them, empty if it has.

    It leaves out documents that it rejects. If none are left, or without a tokenizer, all are estimated from characters.
    """
    problem = ""
    if folder is not None:
        import_tokenizers_without_torch()
        try:
            encoder = Encoder(load_tokenizer(str(folder)), data)
            completions = data.sources[0].completions
            rendered = []
            for document in documents:
                try:
                    rendered.append(encoder.render(encoder.write_as_chat(document, completions)))
                except LauncherError as error:
                    problem = error.problems[0].message
            if rendered:
                return [len(encoded.ids) for encoded in encoder.encode(rendered)], ""
        except LauncherError as error:
            problem = error.problems[0].message
    return [max(1, round(_count_characters(document) / _CHARACTERS_PER_TOKEN)) for document in documents], problem


def _count_characters(document: Document) -> int:
    of_messages = sum(len(message.content) + len(message.role) + 16 for message in document.messages)
    return of_messages + len(document.prompt) + len(document.text)


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        print(json.dumps(sample_data(config)))
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    return 0


if __name__ == "__main__":
    exit_on_termination()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main()
    sys.exit(code)
