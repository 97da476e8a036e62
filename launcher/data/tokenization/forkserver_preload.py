"""What the processes that build the data cache import, once for all of them: they are forks of one that has imported this.

Each of them also imports the main module of the process that builds, whatever that needs.
"""

import os
import signal

# Ctrl-C reaches every process of the terminal; the builder alone handles it and ends the others. Forks inherit this.
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import launcher.data.tokenization.batch_encoder  # noqa: E402, F401
from launcher.data.tokenization.encoder import import_tokenizers_without_torch  # noqa: E402

import_tokenizers_without_torch()
