"""Everything that judges a model; open prepare.py first: an evaluation is prepare, answers (which node starts) and conclude."""
