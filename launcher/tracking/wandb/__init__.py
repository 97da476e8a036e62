"""Weights & Biases: the tracker with its session, and the project; open tracker.py first."""
