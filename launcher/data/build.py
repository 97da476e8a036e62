"""Builds the data cache: read, encode, check, mix, pack, write. Runs on CPU, once per content key."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path

from launcher import collect_garbage_rarely
from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluation import EvalSet
from launcher.data import cache_store, row_layout, sources
from launcher.data.build_report import make_facts, make_report
from launcher.data.cache_store import cache_key
from launcher.data.checks import findings
from launcher.data.corpus import EncodedCorpus, Progress, read_corpus
from launcher.data.selection import Selection, select_documents
from launcher.data.sources.eval_set import make_set_data, name_set
from launcher.data.split import write_origins
from launcher.data.tokenization.batch_encoder import NUM_PROMPTS
from launcher.data.tokenization.encoder import read_template
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts


def build(
    data: DataSection, tokenizer_path: str, on_progress: Progress | None = None, num_embeddings: int | None = None
) -> DataFacts:
    """Build the cache for `data` and the tokenizer in the folder `tokenizer_path`, unless it exists; return its facts.

    `on_progress(stage, done, total)` receives counts of documents; `total` is an upper bound. Token ids beyond `num_embeddings`
    of the model do not stop the build on their own, but are reported together with problems that do.

    Raises:
        DataError: if a source, a row or a template cannot be used, or if nothing is left to train on.
    """
    if problems := sources.check_sources(data):
        raise DataError(problems)
    if (facts := cache_store.find_built(data, tokenizer_path)) is not None:
        return facts
    key = cache_key(data, tokenizer_path)
    with cache_store.lock_folder(key, data.cache_group) as folder:
        if folder is not None:
            _build_into(folder, data, tokenizer_path, on_progress or (lambda stage, done, total: None), num_embeddings)
        if folder is not None and cache_key(data, tokenizer_path) != key:
            # The key describes the bytes before the change.
            message, where = "a data source changed while it was read", ", ".join(source.path for source in data.sources)
            raise DataError(Problem(message, where, remedy="try again when no program is writing to it, or pin its revision"))
    facts = cache_store.find(key, data.cache_group)
    if facts is None:
        where = str(cache_store.cache_dir(key, data.cache_group))
        raise DataError(Problem("the data cache is missing or damaged right after it was built", where, remedy="try again"))
    return facts


def build_eval_sets(
    eval_sets: Mapping[str, EvalSet],
    data: DataSection,
    tokenizer_path: str,
    on_progress: Progress,
    num_embeddings: int | None = None,
) -> dict[str, DataFacts]:
    """Build the caches of `eval_sets` with their settings, but rows built like those of `data`; return their facts by name.

    Raises:
        DataError: with the problems of all sets, each with the name of its set.
    """
    built: dict[str, DataFacts] = {}
    problems: list[Problem] = []
    for setting, eval_set in eval_sets.items():
        section = make_set_data(eval_set, data)
        try:
            facts = built[eval_set.name] = build(section, tokenizer_path, on_progress, num_embeddings)
            refused = findings.problems(findings.read(facts.cache_dir), section.checks)
            problems += [name_set(problem, setting, eval_set) for problem in refused]
        except DataError as error:
            problems += [name_set(problem, setting, eval_set) for problem in error.problems]
    if problems:
        raise DataError(problems)
    return built


def _select(corpus: EncodedCorpus, data: DataSection, id_problem: Problem | None) -> Selection:
    """Select the documents to train on.

    Raises:
        DataError: if rows cannot be used, together with those findings on the other rows that refuse a run; or if nothing is
        left.
            Includes `id_problem`, if there is one.
    """
    row_problems = corpus.problems.refused(data.checks).to_list()
    problems = [*row_problems, *([id_problem] if id_problem else [])]
    try:
        selection = select_documents(corpus, data)
    except DataError as error:
        # With the rows that cannot be used, something might be left.
        if problems:
            raise DataError(problems) from error
        raise
    if row_problems:
        raise DataError([*problems, *findings.problems(selection.findings, data.checks)])
    return selection


def _build_into(folder: Path, data: DataSection, tokenizer_path: str, on_progress: Progress, num_embeddings: int | None) -> None:
    collect_garbage_rarely()
    spool = row_layout.TokenSpool(folder)
    corpus = read_corpus(data, tokenizer_path, spool, on_progress)
    docs, pieces = corpus.docs, corpus.pieces
    on_progress("compare", 0, corpus.num_docs)
    id_problem = None if num_embeddings is None else cache_store.id_problem(corpus.max_token_id, num_embeddings, tokenizer_path)
    selection = _select(corpus, data, id_problem)
    is_dropped, layout = selection.is_dropped, selection.layout
    on_progress("compare", corpus.num_docs, corpus.num_docs)
    on_progress("pack and write", 0, 1)
    held_out_pieces = corpus.select_pieces(is_dropped, held_out=True)
    held_out = row_layout.layout_held_out(pieces.lengths, held_out_pieces, data)
    piece_sources = docs.source[pieces.doc]
    tokens = spool.close()
    digest = "-".join(
        row_layout.write(split_folder, split, pieces.lengths, piece_sources, pieces.labels, tokens, num_sources)
        for split_folder, split, num_sources in (
            (folder, layout, len(data.sources)),
            (folder / "eval", held_out, len(sources.list_inputs(data))),
        )
    )
    spool.remove()
    write_origins(folder, [pieces.doc[split.order] for split in (layout, held_out)], docs.wheres, docs.contents)
    candidates = (prompt for prompt in corpus.prompts if not is_dropped[prompt.doc])
    chosen = heapq.nsmallest(NUM_PROMPTS, candidates, key=lambda prompt: prompt.rank)
    samples = [{"prompt": p.prompt, "prompt_ids": p.prompt_ids, "answer": p.answer} for p in chosen]
    cache_store.write_json(folder / "samples.json", samples)
    findings.write(folder, selection.findings)
    report = make_report(corpus, is_dropped, layout, held_out, selection.epochs, data)
    if data.exclude is not None:
        report["num_excluded"] = selection.num_excluded
    facts = make_facts(report, pieces, layout, held_out, digest).model_copy(update={"chat_template": read_template(data)})
    cache_store.finish(folder, facts, report)
    on_progress("pack and write", 1, 1)
