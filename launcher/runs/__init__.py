"""What happened in the attempts of a run: the journal."""
