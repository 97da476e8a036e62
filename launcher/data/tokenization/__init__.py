"""From documents to token ids and loss masks: chat templates, tokenizers, worker processes. Imports transformers, not torch."""
