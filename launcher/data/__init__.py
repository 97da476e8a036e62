"""From text files to rows of tokens: sources, loss masks, checks, mixture, packing, cache, loader, report.

Only `build`, `loader` and the packages `tokenization` and `checks` (without `findings` and `patterns`) import torch or
transformers; the submit side may import all other modules.
"""
