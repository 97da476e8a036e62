"""What verbs show, laid out for a terminal or an HTML page. Open sections.py first."""
