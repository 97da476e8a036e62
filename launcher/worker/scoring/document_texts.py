"""Human-readable texts of documents in a data cache: the end of the prompt and the beginning of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.cache.split import Split
from launcher.data.checks import patterns
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.plan.launch_plan import LaunchPlan

# Number of tokens from the prompt's end and from the answer's beginning.
_NUM_TOKENS = 80


class DocumentTexts:
    """Decodes the documents of one split; without the run's tokenizer they have no text."""

    def __init__(self, plan: LaunchPlan, split: Split) -> None:
        self._split = split
        folder = plan.model.tokenizer_path
        self._tokenizer: Any = load_tokenizer(folder) if folder is not None and Path(folder).is_dir() else None

    def of(self, document: int) -> dict[str, str]:
        """Return `prompt` and `answer` of a document, without keys, passwords, e-mail addresses and telephone numbers."""
        if self._tokenizer is None:
            return {"prompt": "", "answer": ""}
        span = slice(*(int(at) for at in self._split.docs[document : document + 2]))
        tokens, trained = self._split.tokens[span], self._split.trained[span]
        begin = int(np.argmax(trained)) if trained.any() else len(tokens)
        parts = (tokens[max(0, begin - _NUM_TOKENS) : begin], tokens[begin : begin + _NUM_TOKENS])
        prompt, answer = patterns.redact([self._tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts])
        return {"prompt": prompt.strip(), "answer": answer.strip()}
