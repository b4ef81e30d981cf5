"""Chat completions: the route and its wire models."""
