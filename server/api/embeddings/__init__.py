"""Embeddings: the route and its wire models."""
