"""Bytes, headers, bodies, errors and logs: everything about HTTP that no endpoint owns."""
