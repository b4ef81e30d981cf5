"""JSON Schemas as grammars."""
