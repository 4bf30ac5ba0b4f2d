"""Files, written and read: adapters, official checkpoints."""
