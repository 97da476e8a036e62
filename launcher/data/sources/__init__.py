"""From the sources in the settings to documents: begin with reading.py. No torch, no transformers."""
