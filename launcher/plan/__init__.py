"""What is decided before a run starts, without disk, network, environment or devices; open planner.py first."""
