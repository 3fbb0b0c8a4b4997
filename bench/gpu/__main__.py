"""The command line of :mod:`bench.gpu`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

_DESCRIPTION = """\
Do what only a GPU can show, in the order in which it tells the most, and stop at a hard limit.

--plan first takes 470 s: a smoke test of every kind of recursion, forward passes and training steps against
eager and torch.compile, tuning, the forward passes again, the puzzle trainer. --plan second takes 240 s: the
device tests, what users type, trainers, and what is missing of the first.

Appends to gpu.jsonl (results), rows.jsonl (each row as it comes), tuned.jsonl, crashes.jsonl, gpu-tests.txt
and tables/ in the folder --out; started again, it goes on with what is missing for this commit and device.
The exit code is 1 if anything was wrong: give the machine back and mend it.
"""

_EXAMPLES = """\
examples:
  python -m bench.gpu --plan first --out $OUT --commit $SHA --cache .gpu/sm_90.tar.xz 2>&1 | tee $OUT/gpu.log
  python -m bench.gpu --plan second --out $OUT --commit $SHA --cache .gpu/sm_90.tar.xz --wall 220
  python -m bench.pretend bench.gpu --plan first --out /tmp/out    without a GPU: to see that the plan runs
"""


def main() -> None:
    """Parse the command line and run."""
    # What these read takes half a minute from a cold disk, and is part of the plan's time.
    begun = time.monotonic()
    from bench.gpu.cache import FOLDER
    from bench.gpu.plans import PLANS, within
    from bench.gpu.supervisor import Processes, Supervisor
    from bench.pretend import python
    from llm_trm.benchmark.environment import commit

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", choices=sorted(PLANS), default="first")
    parser.add_argument("--out", type=Path, required=True, help="folder that results are appended in")
    parser.add_argument("--commit", help="the commit that is measured (default: the checkout's)")
    parser.add_argument(
        "--wall", type=float, help="end after so many seconds at the latest (default: the plan's)"
    )
    parser.add_argument(
        "--cache", type=Path, help="Triton cache that python -m bench.precompile packed; it is unpacked first"
    )
    options = parser.parse_args()
    if options.wall is not None and not 10 <= options.wall <= 86400:
        parser.error("--wall must lie between 10 and 86400 seconds")
    if options.cache is not None:
        _use_cache(options.cache)
    elif FOLDER.is_dir():
        os.environ["TRITON_CACHE_DIR"] = str(FOLDER)  # an earlier plan unpacked it
    plan = PLANS[options.plan]
    if options.wall is not None:
        plan = within(plan, options.wall)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended, too
    name = options.commit or commit() or "unknown"
    try:
        supervisor = Supervisor(plan, options.out.resolve(), name, Processes(python()), begun=begun)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be a folder ({error.strerror}); name another")
    sys.exit(supervisor.run())


def _use_cache(archive: Path) -> None:
    """Unpack the cache; without it all is compiled anew, which is no reason to lose a device's minutes."""
    from bench.gpu.cache import unpack

    try:
        folder, differences = unpack(archive)
    except ValueError as error:
        print(f"no cache: {error}", flush=True)
        return
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    for difference in differences:
        print(f"the cache will not be hit: this machine has {difference}", flush=True)


if __name__ == "__main__":
    main()
