"""What the processes that build the data cache import, once for all of them: they are forks of one that has imported this."""

import os
import signal
import sys

# Ctrl-C reaches every process of the terminal; the builder alone handles it and ends the others. Forks inherit this.
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Tokenizers need no torch, and transformers imports it wherever it is installed: a second, and memory in every process.
# transformers remembers that torch is missing; for everything else torch is importable again, because each worker
# also imports the main module of the process that builds, whatever that needs.
hidden = "torch" not in sys.modules
if hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]

import transformers.models.auto.tokenization_auto  # noqa: E402

import launcher.data.encode  # noqa: E402, F401

transformers.utils.is_torch_available()
if hidden:
    del sys.modules["torch"]
