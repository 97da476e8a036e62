"""Checks of nodes, models and settings before a run starts, and for `doctor`; open node_check.py, the table of checks, first."""
