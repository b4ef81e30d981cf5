"""OpenAI's Responses API: the route, its wire models, its events and its store."""
