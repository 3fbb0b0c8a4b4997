"""``python -m llm_trm`` runs the ``llm-trm`` command, for launchers that start a module."""

from llm_trm.cli import main

if __name__ == "__main__":
    main(prog_name="llm-trm")
