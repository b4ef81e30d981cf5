"""Compute a step: inputs, forward pass, sampling."""
