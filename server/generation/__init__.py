"""One request's sequences in the engine, and the reports about them."""
