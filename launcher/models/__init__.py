"""A model on this machine: where it is, its files, code and parent run. Open found_model.py first."""
