"""What the fork server of a data build imports once for all workers; a module of its own, because these lines must run first."""

import os
import signal

# Ctrl-C reaches every process of the terminal, but only the builder handles it and ends the others. Forks inherit this.
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import launcher.data.tokenization.batch_encoder  # noqa: E402, F401
from launcher.data.tokenization.encoder import import_tokenizers_without_torch  # noqa: E402

import_tokenizers_without_torch()
