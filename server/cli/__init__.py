"""The `pyllm` command and its subcommands."""
