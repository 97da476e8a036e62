"""One owner check for folders, redaction of secrets, and printable output. Open folders.py first."""
