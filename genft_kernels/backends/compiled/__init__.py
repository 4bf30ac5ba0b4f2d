"""Code compiled on first use. Needs neither torch nor the rest of the package: setup.py loads it by its path."""
