"""Planted faults, each of which must turn a test red."""
