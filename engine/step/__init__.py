"""One step: which requests run, and the handling of their tokens. Needs no weights."""
