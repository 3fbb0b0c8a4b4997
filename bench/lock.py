"""Locks the environments that .ci/run tests: ``python -m bench.lock``.

constraints.txt is one tested set for every Python and platform that is served: the newest packages at the
time of the lock, with markers where they differ, without local version tags. .ci/floors.txt is the lowest
that pyproject.toml allows of each direct dependency, on the lowest Python; .ci/floors-build.txt is the same
of what builds the package. uv resolves them, from PyPI.

Without ``--upgrade``, packages that these files name keep their versions. ``--check`` changes nothing: it
fails unless every package installed here is in constraints.txt at its version.
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
#: torch's newest release with a CPU build on the machines of .ci/run; the others bring 5 GB of CUDA packages.
HELD = "torch==2.13.0"
#: Extras that people combine with the lock.
LOCKED_EXTRAS = ("dev", "peers")
#: Extras of the floors' environment.
FLOOR_EXTRAS = ("train", "rl", "plot", "test")
#: Tools that read the sources or make environments: they run in the locked environment alone.
TOOLS = {"ruff", "mypy", "import-linter", "uv"}
#: Part of every environment, and of no lock.
UNLOCKED = {"llm-trm", "pip"}


def floors() -> list[Requirement]:
    """Every direct dependency of the floors' environment, pinned to its lower bound in pyproject.toml."""
    project = _pyproject()["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in FLOOR_EXTRAS for line in optional[extra])]
    wanted = [Requirement(line) for line in lines]
    return [_to_its_floor(one) for one in wanted if one.name not in TOOLS | UNLOCKED]


def build_floors() -> list[Requirement]:
    """What builds the package, pinned to its lower bound in pyproject.toml."""
    return [_to_its_floor(Requirement(line)) for line in _pyproject()["build-system"]["requires"]]


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _to_its_floor(requirement: Requirement) -> Requirement:
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: {requirement} needs one lower bound, which .ci/run can install")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return Requirement(f"{requirement.name}=={bounds[0]}{marker}")


def locked(path: Path) -> Iterator[Requirement]:
    """The pins of a lock; a package has several where markers tell them apart."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def differences() -> list[str]:
    """What is installed here and not in constraints.txt, or at another version, a line each."""
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
    group.add_argument("--check", action="store_true", help="compare what is installed with constraints.txt")
    group.add_argument("--upgrade", action="store_true", help="take the newest of every package")
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
        sys.exit(f"{output.name}: uv found no such set of packages (above)")


if __name__ == "__main__":
    main()
