"""Compile, without a GPU, every kernel that the first GPU plan launches, and pack Triton's cache to travel.

Runs ``python -m bench.gpu`` on a pretended H100 (:mod:`bench.pretend`): the kernels go through Triton's own
launch path, so that what a real launch looks up is there. Python, Triton and the source must be those of the
GPU machine; the archive says what it was made with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench import pretend
from bench.gpu.cache import FOLDER, pack
from bench.gpu.plans import PLANS, Plan
from bench.gpu.supervisor import Processes, Supervisor

#: What is carried to a GPU machine beside the working tree.
MOST_BYTES = 16 * 2**20
#: A core here against a plan's clock: a task may take this much longer, so that nothing is left out.
_SLOWER = 100.0

_EXAMPLES = """\
examples:
  python -m bench.precompile                     what --plan first launches, for sm_90, to .gpu/sm_90.tar.xz
  python -m bench.precompile --leave-out tune    without the tuner's candidates, which take most of the time
"""


def unhurried(plan: Plan, leave_out: Iterable[str] = (), processes: int = 1) -> Plan:
    """The plan with time enough for a slow core, without the stages named ``leave_out``."""
    stages = tuple(
        replace(
            stage,
            until=_SLOWER * stage.until,
            processes=min(stage.processes, processes),
            tasks=tuple(replace(task, seconds=_SLOWER * task.seconds) for task in stage.tasks),
        )
        for stage in plan.stages
        if stage.name not in leave_out
    )
    return Plan(stages, _SLOWER * plan.wall)


def fill(plan: Plan, folder: Path, out: Path) -> Supervisor:
    """Run ``plan`` on a pretended GPU with Triton's cache in ``folder``; what it writes goes to ``out``."""
    host = Processes(pretend.COMMAND, {"TRITON_CACHE_DIR": str(folder)})
    supervisor = Supervisor(plan, out, "pretended", host, patience=_SLOWER)
    supervisor.run()
    return supervisor


def main() -> None:
    """Parse the command line, fill and pack; exit code 1 where a task failed or the archive is too large."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precompile",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu/sm_90.tar.xz"), help="default: %(default)s")
    parser.add_argument("--plan", choices=sorted(PLANS), default="first")
    stages = sorted({stage.name for plan in PLANS.values() for stage in plan.stages} - {"probe"})
    parser.add_argument("--leave-out", nargs="*", choices=stages, default=[], metavar="STAGE")
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help="where the cache lies, here and there (default: %(default)s)",
    )
    options = parser.parse_args()
    if not options.folder.is_absolute():
        parser.error("--folder must be absolute: the cache names its files by it")
    if options.folder.exists():
        shutil.rmtree(options.folder)
    plan = unhurried(PLANS[options.plan], options.leave_out, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as out:
        supervisor = fill(plan, options.folder, Path(out))
    size = pack(options.folder, options.out)
    kernels = supervisor.compiled.total()
    print(f"{options.out}: {kernels} kernels, {size / 2**20:.1f} MiB, to lie in {options.folder}")
    if supervisor.outcome.red:
        sys.exit(1)
    if size > MOST_BYTES:
        print(f"over {MOST_BYTES / 2**20:.0f} MiB: leave stages out (--leave-out)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
