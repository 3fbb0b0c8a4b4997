"""Locks the environments that .ci/run tests: ``python -m bench.lock``.

constraints.txt is one tested set of packages for all supported Python versions and platforms: the newest
versions at the time of the lock, with markers where they differ, and without local version tags.
.ci/floors.txt has the lowest version of each direct dependency that pyproject.toml allows, on the lowest
Python. .ci/floors-build.txt is the same for the build dependencies. uv resolves them from PyPI.

Without ``--upgrade``, packages in these files keep their versions. ``--check`` changes nothing: it fails
unless every installed package is in constraints.txt with its version.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
FLOORS = ROOT / ".ci" / "floors.txt"
BUILD_FLOORS = ROOT / ".ci" / "floors-build.txt"
LOWEST_PYTHON = "3.11"
#: torch's newest release with a CPU build on the machines of .ci/run. Others install 5 GB of CUDA packages.
HELD = "torch==2.13.0"
#: Extras that can be combined with the lock.
LOCKED_EXTRAS = ("dev", "peers")
#: Extras of the floors' environment.
FLOOR_EXTRAS = ("train", "rl", "plot", "test")
#: Tools that check the sources or create environments, which only run in the locked environment.
TOOLS = {"ruff", "mypy", "import-linter", "uv"}
#: Packages in every environment but in no lock.
UNLOCKED = {"llm-trm", "pip"}


def floors() -> list[Requirement]:
    """All direct dependencies of the floors' environment, pinned to their lower bounds in pyproject.toml."""
    project = _pyproject()["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in FLOOR_EXTRAS for line in optional[extra])]
    wanted = [Requirement(line) for line in lines]
    return [_to_its_floor(one) for one in wanted if one.name not in TOOLS | UNLOCKED]


def build_floors() -> list[Requirement]:
    """The build dependencies, pinned to their lower bounds in pyproject.toml."""
    return [_to_its_floor(Requirement(line)) for line in _pyproject()["build-system"]["requires"]]


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _to_its_floor(requirement: Requirement) -> Requirement:
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: {requirement} needs exactly one lower bound for .ci/run")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return Requirement(f"{requirement.name}=={bounds[0]}{marker}")


def locked(path: Path) -> Iterator[Requirement]:
    """Yield the pins of a lock; a package may have several with different markers."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def differences() -> list[str]:
    """One line for each installed package that is missing in constraints.txt or has another version."""
    pins = {
        canonicalize_name(pin.name): pin
        for pin in locked(CONSTRAINTS)
        if pin.marker is None or pin.marker.evaluate()
    }
    found = []
    for distribution in distributions():
        name, version = canonicalize_name(distribution.name), Version(distribution.version)
        if name in UNLOCKED:
            continue
        pin = pins.get(name)
        if pin is None:
            found.append(f"{name} {version} is not locked")
        elif version.public not in pin.specifier:
            found.append(f"{name} {version} is locked at {pin.specifier}")
    return sorted(set(found))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.lock", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="Compare installed packages with the lock.")
    group.add_argument("--upgrade", action="store_true", help="Upgrade every package to its newest version.")
    options = parser.parse_args()
    if options.check:
        if found := differences():
            sys.exit("\n".join([*found, "this is not the environment of constraints.txt"]))
        return
    if importlib.util.find_spec("uv") is None:
        sys.exit("bench.lock needs uv: pip install -c constraints.txt -e '.[dev]'")
    extras = [option for extra in LOCKED_EXTRAS for option in ("--extra", extra)]
    upgrade = ["--upgrade"] if options.upgrade else []
    _compile(CONSTRAINTS, HELD, "pyproject.toml", *extras, "--constraints", "-", "--universal", *upgrade)
    _compile(FLOORS, _lines(floors()), "-", "--python-platform", "x86_64-manylinux_2_28", *upgrade)
    BUILD_FLOORS.write_text(_lines(build_floors()))


def _lines(requirements: list[Requirement]) -> str:
    return "".join(f"{requirement}\n" for requirement in requirements)


def _compile(output: Path, stdin: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", *arguments]
    command += ["--python-version", LOWEST_PYTHON, "--output-file", str(output)]
    command += ["--custom-compile-command", "python -m bench.lock"]
    done = subprocess.run(command, cwd=ROOT, input=stdin, text=True)
    if done.returncode:
        sys.exit(f"{output.name}: uv could not resolve the packages (see above)")


if __name__ == "__main__":
    main()
