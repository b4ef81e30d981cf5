"""Constrained decoding with llguidance."""
