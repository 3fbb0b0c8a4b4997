"""The ``llm-trm`` command, also ``python -m llm_trm`` for launchers that start a module."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command."""
    try:
        from llm_trm.cli import main as command
    except KeyboardInterrupt:  # click and numpy take half a second to import
        print("llm-trm: interrupted", file=sys.stderr)
        sys.exit(130)
    command(prog_name="llm-trm")


if __name__ == "__main__":
    main()
