"""Side-by-side measurements against the peers; no part of the installed package."""
