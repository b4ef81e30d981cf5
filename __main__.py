"""`python -m pyllm` is the `pyllm` command."""

from __future__ import annotations

import sys

from .server.lifetime import Lifetime, use_one_allocator


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["serve"]:
        use_one_allocator()
    lifetime = Lifetime.begin(sys.argv[1:])  # before the imports that take long
    from .server.cli.main import main as run

    run(lifetime=lifetime)


if __name__ == "__main__":
    main()
