"""What a run keeps on disk: its records and journal, how files are written and locked."""
