"""Decoding with adapters, token by token."""
