"""`python -m pyllm` is the `pyllm` command."""

from .server.cli.main import main

if __name__ == "__main__":
    main()
