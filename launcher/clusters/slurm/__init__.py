"""The Slurm backend: open cluster.py first."""
