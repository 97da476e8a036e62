"""Settings: Hydra composes conf/, a run's file and the command line into a `RunConfig`; open compose.py first."""
