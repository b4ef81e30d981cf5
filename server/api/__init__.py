"""Every request and answer as a pydantic model: the bounds that are checked are the bounds in the OpenAPI page.

A field that is null is absent. Answers are written as plain JSON for speed; their models stand here for the
OpenAPI page, and the tests hold every answer against them.
"""
