"""The endpoints. Every request and answer is a pydantic model, whose bounds are those of the OpenAPI page.

A field that is null is absent. Answers are written as plain JSON for speed: their models describe them on the OpenAPI
page, and the tests validate every answer against them.
"""
