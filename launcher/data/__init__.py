"""Text files become rows of tokens: begin with build.py, which builds the data cache, and loader.py, which reads it in training.

The submit side must not import `loader`, `build`, `corpus`, `tokenization` and `checks.inspection`.
"""
