"""Prepares model, tokenizer and data cache on CPU, before any GPU is requested: `python -m launcher.worker.prepare`.

Reads a RunConfig as JSON from standard input, fetches or converts model and tokenizer, compares the weight files with the model,
and builds the data cache. Writes progress to standard error, and one JSON object (with the report, if requested) to standard
output.

This module does not import torch at module level, because multiprocessing imports the main module again in each worker of the
data build.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

from launcher.child_process import exit_on_termination
from launcher.config.schema import RunConfig
from launcher.data import build, report
from launcher.data.cache_dir import cache_root, make_cache_error
from launcher.data.sources.reading import RowProblems, find_row_problems, make_set_data, name_set
from launcher.data.tokenization.encoder import import_tokenizers_without_torch, load_tokenizer
from launcher.errors import EXIT_FAILED, ConfigError, DataError, LauncherError, Problem, RunError
from launcher.model_folders import fetch_model
from launcher.models.found_model import find_model, locate
from launcher.security.redaction import printable_output
from launcher.tracking.progress import show_documents
from launcher.worker.checks.model_check import require_weights

# The argument that limits preparation to the caches of eval.sets.
EVAL_SETS_ALONE = "--eval-sets"


def prepare(config: RunConfig, show: int | None = None, only_eval_sets: bool = False) -> dict[str, object]:
    """Prepare everything that the ranks read; returns the data report with `show` rows, or an empty dictionary if it is None.

    With `only_eval_sets`, only the caches of the evaluation sets are built, for a run whose other data exists.
    """
    if not only_eval_sets:
        names = [name for name in dict.fromkeys((config.model.path, config.model.tokenizer)) if name]
        if any(locate(name, config.model).folder is None for name in names):
            # Report unreadable rows before downloading a model.
            _require_readable_rows(config)
        for name in names:
            fetch_model(name, config.model)
        require_weights(find_model(config.model), partial(print, file=sys.stderr, flush=True))
    found = find_model(config.model)
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise ConfigError("the tokenizer is missing", where="model.tokenizer")
    # Nothing after this needs torch.
    import_tokenizers_without_torch()
    with show_documents() as on_progress:
        arguments = (config.data, str(tokenizer), on_progress, found.facts.vocab_size)
        built = None if only_eval_sets else build.build(*arguments)
        eval_sets = build.build_eval_sets(config.eval.sets_by_setting, *arguments)
    if built is None or show is None:
        return {}
    loaded = load_tokenizer(str(tokenizer))

    def decode(ids: list[int]) -> str:
        return str(loaded.decode(ids, clean_up_tokenization_spaces=False))

    return {"report": report.report(built, config.data, decode, config.train, config.run.seed, found.stop_ids, show, eval_sets)}


def _require_readable_rows(config: RunConfig) -> None:
    problems = RowProblems()
    for source in config.data.sources:
        if source.is_read:
            problems.merge(find_row_problems(source))
    row_problems = problems.refused(config.data.checks).to_list()
    for setting, eval_set in config.eval.sets_by_setting.items():
        section = make_set_data(eval_set, config.data)
        of_set = find_row_problems(section.sources[0]).refused(section.checks)
        row_problems += [name_set(problem, setting, eval_set) for problem in of_set.to_list()]
    if row_problems:
        raise DataError(row_problems)


def _find_storage_error(error: Exception) -> LauncherError | None:
    """Return the user-facing error if the system refused to write or read a file, or None for another exception."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    # The cache's parent folders are created with it.
    if path is None or path.is_relative_to(cache_root()) or cache_root().is_relative_to(path):
        return make_cache_error(error, cache_root() / "models")
    remedy = "check its permissions and the disk"
    return DataError(Problem(f"a file cannot be used: {error.strerror}", where=str(path), remedy=remedy))


def main(argv: list[str]) -> int:
    # Here the tokenizer may use all threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    config = RunConfig.model_validate_json(sys.stdin.read())
    report_rows = [argument.removeprefix("--report=") for argument in argv if argument.startswith("--report=")]
    try:
        print(json.dumps(prepare(config, int(report_rows[0]) if report_rows else None, EVAL_SETS_ALONE in argv)))
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    except Exception as error:
        if (storage_error := _find_storage_error(error)) is not None:
            print(json.dumps(storage_error.to_report()))
            return storage_error.exit_code
        traceback.print_exc()
        print(json.dumps(RunError(f"preparing the data failed: {type(error).__name__}: {error}").to_report()))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    exit_on_termination()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main(sys.argv[1:])
    sys.exit(code)
