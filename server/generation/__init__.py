"""One request's sequences in the engine, and what is reported of them."""
