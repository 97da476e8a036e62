"""Measure the CPU time of one data cache build; run by benchmarks/data.py.

python benchmarks/build_cpu.py ROWS TOKENIZER MAX_LENGTH [--without-word-cache] [--checkout=FOLDER]

--without-word-cache disables the word cache of fast_tokenizer.py; --checkout uses the launcher in another checkout.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def cpu_s() -> float:
    """Return the user and system CPU seconds of this process and the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(rows: str, tokenizer: str, max_length: str, *options: str) -> None:
    # As in a build, which parallelizes by processes instead.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path[:0] = [option.removeprefix("--checkout=") for option in options if option.startswith("--checkout=")]
    from launcher.config.sections.data import DataSection, Source
    from launcher.data.build import build
    from launcher.data.tokenization import encoder, fast_tokenizer

    if "--without-word-cache" in options:
        fast_tokenizer.make_cached = lambda tokenizer: None
    # Loading a tokenizer imports transformers, which is not part of the measurement.
    encoder.load_tokenizer(tokenizer)
    data = DataSection(sources=(Source(path=rows),), max_length=int(max_length), workers=1)
    began = cpu_s()
    facts = build(data, tokenizer)
    print(json.dumps({"cpu_s": cpu_s() - began, "documents": facts.num_docs, "tokens": facts.num_tokens, "digest": facts.digest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
