"""The version of doctor, in the one place that every file may import."""

__version__ = "0.1.0"
