"""The ranks of a node as processes: how they start, are watched, and end; open rank_main.py, which is one rank, first."""
