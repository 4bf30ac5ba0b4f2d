"""The version, imported by all that shows or ships it."""

__version__ = "0.2.0"
