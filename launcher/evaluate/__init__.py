"""Everything that judges a model; open evaluation.py first: it prepares and concludes an evaluation; answers.py answers."""
