"""Checks of the data; begin with findings.py: what each check means. inspection.py judges single documents, overlap.py compares them."""
