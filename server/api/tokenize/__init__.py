"""Tokenise and detokenise: the routes and their wire models."""
