"""One owner check for folders, redaction and printable output, connections. Open folders.py first."""
