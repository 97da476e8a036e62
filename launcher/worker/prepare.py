"""What is done once, on CPU, before any GPU is asked for: `python -m launcher.worker.prepare`.

Reads a RunConfig as JSON from standard input; fetches or converts model and tokenizer, builds the data cache.
Progress goes to standard error, one JSON object with the report (where asked for) to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque

from launcher import facts
from launcher.config.schema import ModelSection, RunConfig
from launcher.data import build, report, sources
from launcher.errors import ConfigError, LauncherError, Problem

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*", "NOTICE*"]


def prepare(config: RunConfig, want_report: bool) -> dict[str, object]:
    """Make everything that the ranks read exist on this machine; returns the data report or nothing."""
    wanted = [name for name in dict.fromkeys((config.model.path, config.model.tokenizer)) if name]
    if any(facts.locate(name, config.model).folder is None for name in wanted):
        # A row that cannot be read is told at once, not after a model was fetched.
        for source in config.data.sources:
            deque(sources.read_documents(source), maxlen=0)
    for name in wanted:
        _fetch(name, config.model)
    tokenizer = facts.locate(config.model.tokenizer or config.model.path or "", config.model).folder
    if tokenizer is None:
        raise ConfigError("the tokenizer is not there after it was fetched", where="model.tokenizer")
    built = build.build(config.data, str(tokenizer), _print_progress)
    if not want_report:
        return {}
    facts_of_data = report.report(built, str(tokenizer))
    return {"report": facts_of_data, "text": report.render(facts_of_data)}


def _fetch(source: str, model: ModelSection) -> None:
    located = facts.locate(source, model)
    if located.folder is not None:
        return
    if located.source is not None:
        from launcher.train.model import convert_gguf

        _say(f"converting {located.source.name} to a Hugging Face folder (once)")
        convert_gguf(located.source, facts.converted_folder(located.source))
    else:
        _download(source, model)


def _download(repo_id: str, model: ModelSection) -> None:
    from huggingface_hub import snapshot_download

    # Code is pinned by model.revision, and only the model's repository is.
    with_code = model.trust_remote_code and repo_id == model.path
    patterns = [*_HUB_FILES, *(["*.bin"] if model.allow_pickled_weights else []), *(["*.py"] if with_code else [])]
    revision = model.revision if repo_id == model.path else None
    _say(f"fetching {repo_id} from the hub")
    try:
        # Some repositories hold the same weights a second time, in their makers' own form.
        snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"])
    except Exception as error:
        raise ConfigError(
            Problem(
                f"{repo_id} cannot be fetched from the hub: {type(error).__name__}",
                where="model.path",
                value=repo_id,
                remedy="check the name, the network and, for a gated model, HF_TOKEN in the environment; or use a local folder",
            )
        ) from error


def _print_progress(what: str, done: int, total: int) -> None:
    if total > 1:
        _say(f"{what}: {done:,} of {total:,} documents")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    # Ranks and data need no GPU here, and the tokenizer's threads are wanted.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Progress bars and warnings of libraries would break up the plain lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        print(json.dumps(prepare(config, "--report" in argv)))
    except LauncherError as error:
        problems = [[p.what, p.where, p.value, p.remedy] for p in error.problems]
        print(json.dumps({"problems": problems}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
