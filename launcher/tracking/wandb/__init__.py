"""Weights & Biases: the tracker, the account, verdicts and the workspace; open tracker.py first."""
