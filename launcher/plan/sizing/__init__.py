"""Memory and speed of a run, and the combination of settings that is fastest and fits; open combinations.py first."""
