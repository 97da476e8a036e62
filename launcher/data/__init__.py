"""From files of text to rows of tokens: sources, chat templates and masks, packing, cache, loader, report.

`sources`, `stdlib_docs`, `packing` and `cache` need neither torch nor transformers, so the submit side may
import them; `chat`, `build`, `loader` and `report` belong to the heavy side.
"""
