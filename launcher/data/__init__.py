"""From files of text to rows of tokens: sources, loss masks, checks, mixture, packing, cache, loader, report.

All modules but `build`, `loader` and the packages `tokenization` and `checks` (without `findings` and `patterns`) import neither
torch nor transformers, so that the submit side may import them.
"""
