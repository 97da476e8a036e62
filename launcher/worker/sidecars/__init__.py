"""Processes beside the ranks on the head node: copies to the mirror, and answers of checkpoints; open sidecar.py first."""
