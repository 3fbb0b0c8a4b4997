"""Compile all kernels of the first GPU plan without a GPU, and pack Triton's cache for the GPU machine.

Runs ``python -m bench.gpu`` on a simulated H100 (:mod:`bench.pretend`): the kernels go through Triton's own
launch path, so a real launch finds them in the cache. Python, Triton and the source must be the same as on
the GPU machine; the archive records their versions.
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

#: Maximum size of the archive that is copied to a GPU machine with the working tree.
MOST_BYTES = 16 * 2**20
#: Factor by which tasks may take longer here than on a GPU machine, so that none is skipped.
_SLOWER = 100.0

_EXAMPLES = """\
examples:
  python -m bench.precompile                     kernels of --plan first for sm_90, to .gpu/sm_90.tar.xz
  python -m bench.precompile --leave-out tune    without the tuner's candidates, which take most of the time
"""


def unhurried(plan: Plan, leave_out: Iterable[str] = (), processes: int = 1) -> Plan:
    """The plan with time limits for a slow core, without the stages ``leave_out``."""
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
    """Run ``plan`` on a simulated GPU with Triton's cache in ``folder`` and output in ``out``."""
    host = Processes(pretend.COMMAND, {"TRITON_CACHE_DIR": str(folder)})
    supervisor = Supervisor(plan, out, "pretended", host, patience=_SLOWER)
    supervisor.run()
    return supervisor


def main() -> None:
    """Fill and pack the cache. The exit code is 1 if a task fails or the archive is too large."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precompile",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu/sm_90.tar.xz"), help="(default: %(default)s)")
    parser.add_argument("--plan", choices=sorted(PLANS), default="first")
    stages = sorted({stage.name for plan in PLANS.values() for stage in plan.stages} - {"probe"})
    parser.add_argument("--leave-out", nargs="*", choices=stages, default=[], metavar="STAGE")
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help="Folder of the cache on both machines (default: %(default)s).",
    )
    options = parser.parse_args()
    if not options.folder.is_absolute():
        parser.error("--folder must be absolute, because the cache contains absolute paths")
    if options.folder.exists():
        shutil.rmtree(options.folder)
    plan = unhurried(PLANS[options.plan], options.leave_out, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as out:
        supervisor = fill(plan, options.folder, Path(out))
    size = pack(options.folder, options.out)
    kernels = supervisor.compiled.total()
    print(f"{options.out}: {kernels} kernels, {size / 2**20:.1f} MiB, to unpack in {options.folder}")
    if supervisor.outcome.red:
        sys.exit(1)
    if size > MOST_BYTES:
        print(f"over {MOST_BYTES / 2**20:.0f} MiB: skip some stages with --leave-out", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
