"""What the plan reads from a config.json: sizes, parameters, FLOPs and problems. Open facts.py first."""
