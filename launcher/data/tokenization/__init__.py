"""From documents to token ids and loss masks; begin with encoder.py. Imports transformers, not torch."""
