"""The submit side of cluster=ray. Open cluster.py first."""
