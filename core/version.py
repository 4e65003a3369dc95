"""The version of the package, written into recipes."""

__version__ = "0.1.0"
