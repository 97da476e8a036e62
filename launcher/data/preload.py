"""What the processes that build the data cache import, once for all of them: they are forks of one that has imported this."""

import os
import signal
import sys

# The builder hears Ctrl-C and ends the others, which must not speak of it, not even while they start: forks inherit this.
signal.signal(signal.SIGINT, signal.SIG_IGN)
# Tokenizers need no torch, and transformers imports it wherever it finds it: a second, and memory in every process.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import transformers.models.auto.tokenization_auto  # noqa: E402, F401

import launcher.data.encode  # noqa: E402, F401
