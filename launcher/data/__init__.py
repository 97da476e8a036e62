"""From text files to rows of tokens: begin with build.py, which builds the data cache, and loader.py, which reads it in training.

Only `loader` imports torch. It, `build`, `corpus`, `tokenization` and `checks.inspection` are for the workers; the
submit side may import all other modules.
"""
