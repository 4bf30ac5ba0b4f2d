"""One generation of factors for all layers that share a generator."""
