"""Finding and reading checkpoints: hub, files, eras."""
