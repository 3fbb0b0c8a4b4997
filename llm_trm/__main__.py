"""``python -m llm_trm``: the ``llm-trm`` command, for launchers that take a module."""

from llm_trm.cli import main

if __name__ == "__main__":
    main(prog_name="llm-trm")
