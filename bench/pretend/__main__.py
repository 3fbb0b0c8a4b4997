"""``python -m bench.pretend MODULE ARGUMENTS...`` runs a module on a simulated GPU."""

from __future__ import annotations

import os
import runpy
import sys

from bench.pretend import VARIABLE


def main() -> None:
    """Install the simulated GPU and run the module on the command line."""
    if len(sys.argv) < 2:
        print("usage: python -m bench.pretend MODULE [ARGUMENTS...]", file=sys.stderr)
        sys.exit(2)
    # Part of the keys of Triton's cache; Triton 3.10 changes the default.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ[VARIABLE] = "1"
    from bench.pretend import cuda, driver

    cuda.install()
    driver.install()
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
