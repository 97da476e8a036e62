"""CPU time of one build of the data cache: benchmarks/data.py runs it.

python benchmarks/build_cpu.py ROWS TOKENIZER MAX_LENGTH [--without-word-cache] [--checkout=FOLDER]

--without-word-cache builds without the word cache of fast_tokenizer.py, --checkout with the launcher in another checkout.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def cpu_s() -> float:
    """CPU seconds of this process and of the children that it has waited for, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(rows: str, tokenizer: str, max_length: str, *options: str) -> None:
    # As in the processes of a build: they are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path[:0] = [option.removeprefix("--checkout=") for option in options if option.startswith("--checkout=")]
    from launcher.config.sections.data import DataSection, Source
    from launcher.data.build import build
    from launcher.data.tokenization import encoder, fast_tokenizer

    if "--without-word-cache" in options:
        fast_tokenizer.make_cached = lambda tokenizer: None
    # Loading a tokenizer imports transformers, which both sides do once.
    encoder.load_tokenizer(tokenizer)
    data = DataSection(sources=(Source(path=rows),), max_length=int(max_length), workers=1)
    began = cpu_s()
    facts = build(data, tokenizer)
    print(json.dumps({"cpu_s": cpu_s() - began, "documents": facts.num_docs, "tokens": facts.num_tokens, "digest": facts.digest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
