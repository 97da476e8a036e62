"""From files of text to rows of tokens: sources, masks, faults, mixture, packing, cache, loader, report.

`sources`, `stdlib_docs`, `packing`, `mixture`, `cache` and `findings` need neither torch nor transformers, so the submit side
may import them; the others belong to the heavy side.
"""
