"""One step: which requests run, and what becomes of their tokens. Needs no weights."""
