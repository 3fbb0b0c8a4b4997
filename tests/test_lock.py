"""The lock file and the lower bounds agree with pyproject.toml."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import lock

#: Packages that have changed APIs that we use.
MOVED_BEFORE = {"transformers", "trl", "peft", "datasets", "accelerate"}


def _declared() -> list[Requirement]:
    project = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())["project"]
    optional = (line for lines in project["optional-dependencies"].values() for line in lines)
    lines = [*project["dependencies"], *optional]
    return [wanted for wanted in map(Requirement, lines) if wanted.name not in lock.UNLOCKED]


def test_every_dependency_is_locked_within_its_bounds() -> None:
    pins = list(lock.locked(lock.CONSTRAINTS))
    for wanted in _declared():
        found = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert found, f"{wanted.name} is not in constraints.txt: python -m bench.lock"
        for pin in found:
            (exact,) = pin.specifier
            assert exact.operator == "==" and "+" not in exact.version
            assert exact.version in wanted.specifier, f"{pin} against {wanted}: python -m bench.lock"


def test_floors_install_every_lower_bound() -> None:
    pins = {canonicalize_name(pin.name): pin.specifier for pin in lock.locked(lock.FLOORS)}
    for floor in lock.floors():
        assert pins.get(canonicalize_name(floor.name)) == floor.specifier, "python -m bench.lock"
    assert lock.BUILD_FLOORS.read_text().split() == [str(floor) for floor in lock.build_floors()]


def test_packages_that_moved_before_stop_at_their_next_major_version() -> None:
    bounded = {
        wanted.name for wanted in _declared() if any(bound.operator == "<" for bound in wanted.specifier)
    }
    assert bounded >= MOVED_BEFORE
