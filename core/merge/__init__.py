"""Adapters in, one adapter and a report out."""
