"""Training in the ranks: open loop.py first."""
