"""What commands print in a terminal, one file for each kind of output."""
