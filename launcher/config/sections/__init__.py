"""One section of settings per class: `fields.py` has the types of values; open the file of the section that you look for."""
