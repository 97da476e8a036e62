"""Checkpoints: written, committed, read on any number of ranks, kept, mirrored; open store.py first."""
