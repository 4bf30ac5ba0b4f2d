"""One layer, forward and backward, every provider side by side."""
