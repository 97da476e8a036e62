"""Checks of the data: of single documents, and of documents against each other. Begin with findings.py: what each check means."""
