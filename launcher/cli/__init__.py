"""The command line; open verbs.py first: its table names the function of each verb."""
