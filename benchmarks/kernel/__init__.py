"""Each kernel alone, beside its floor."""
