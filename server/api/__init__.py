"""The endpoints. Every request and response body is a pydantic model, whose bounds are those of the OpenAPI page.

A null field is treated as absent. Responses are written as plain JSON for speed: their models describe them on the
OpenAPI page, and the tests validate every response against them.
"""
