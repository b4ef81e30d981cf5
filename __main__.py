"""`python -m pyllm` is the `pyllm` command."""

from .server.cli import main

if __name__ == "__main__":
    main()
