"""The data cache on disk: its key, its folder, and the arrays of its splits with their digests."""
