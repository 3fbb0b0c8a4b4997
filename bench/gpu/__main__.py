"""The command line of :mod:`bench.gpu`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

_DESCRIPTION = """\
Run all checks and measurements that need a GPU, most informative first, and stop at a hard time limit.

--plan first takes 470 s: a smoke test of every kind of recursion, forward passes and training steps against
eager and torch.compile, tuning, the forward passes again, and the puzzle trainer. --plan second takes 240 s:
the device tests, users' commands, trainers, and the missing cases of the first plan.

Appends to gpu.jsonl (results), rows.jsonl (individual rows), tuned.jsonl, crashes.jsonl, gpu-tests.txt and
tables/ in the folder --out. When restarted, it resumes with the missing tasks of this commit and device. The
exit code is 1 if anything is wrong: release the machine and fix the problem.
"""

_EXAMPLES = """\
examples:
  python -m bench.gpu --plan first --out $OUT --commit $SHA --cache .gpu/sm_90.tar.xz 2>&1 | tee $OUT/gpu.log
  python -m bench.gpu --plan second --out $OUT --commit $SHA --cache .gpu/sm_90.tar.xz --wall 220
  python -m bench.pretend bench.gpu --plan first --out /tmp/out    a test of the plan without a GPU
"""


def main() -> None:
    """Parse the command line and run."""
    # These imports take half a minute from a cold disk, which counts towards the plan's time.
    start = time.monotonic()
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
    parser.add_argument("--out", type=Path, required=True, help="Folder to append results in.")
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    parser.add_argument("--wall", type=float, help="Time limit in seconds (default: the plan's).")
    parser.add_argument(
        "--cache", type=Path, help="Triton cache packed by python -m bench.precompile, to unpack first."
    )
    options = parser.parse_args()
    if options.wall is not None and not 10 <= options.wall <= 86400:
        parser.error("--wall must be between 10 and 86400 seconds")
    if options.cache is not None:
        _use_cache(options.cache)
    elif FOLDER.is_dir():
        os.environ["TRITON_CACHE_DIR"] = str(FOLDER)  # an earlier plan unpacked it
    plan = PLANS[options.plan]
    if options.wall is not None:
        plan = within(plan, options.wall)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end as well
    name = options.commit or commit() or "unknown"
    try:
        supervisor = Supervisor(plan, options.out.resolve(), name, Processes(python()), start=start)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be created ({error.strerror}): choose another folder")
    sys.exit(supervisor.run())


def _use_cache(archive: Path) -> None:
    """Unpack the cache. On failure the plan still runs, but compiles all kernels again."""
    from bench.gpu.cache import unpack

    try:
        folder, differences = unpack(archive)
    except ValueError as error:
        print(f"no cache: {error}", flush=True)
        return
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    for difference in differences:
        print(f"the cache will not be used: this machine has {difference}", flush=True)


if __name__ == "__main__":
    main()
