"""The engine as the API process sees it. Imports no torch."""
