"""`make package`: what a wheel of this project must hold, and that its command runs from it alone.

python -m tests.wheel dist/ckpt_engine-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    "ckpt_engine": ROOT / "ckpt_engine",
    "ckpt_engine_vllm": ROOT / "integrations/vllm/ckpt_engine_vllm",
    "ckpt_engine_sglang": ROOT / "integrations/sglang/ckpt_engine_sglang",
    "ckpt_engine_ascend": ROOT / "integrations/ascend/ckpt_engine_ascend",
}
ENTRY_POINTS = {
    "console_scripts": {"ckpt-engine": "ckpt_engine.cli.main:main"},
    "vllm.general_plugins": {"ckpt_engine": "ckpt_engine_vllm.plugin:register"},
    "sglang.srt.plugins": {"ckpt_engine": "ckpt_engine_sglang.plugin:register"},
}


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        points = configparser.ConfigParser(delimiters="=")
        points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        metadata = archive.read(f"{info}/METADATA").decode()
    code = {name for name in names if not name.startswith(f"{info}/")}
    assert code == expected_files(), sorted(code ^ expected_files())
    assert all(f"{package}/py.typed" in names for package in SOURCES)
    assert f"{info}/licenses/LICENSE" in names
    assert {section: dict(points[section]) for section in points.sections()} == ENTRY_POINTS
    assert "License-Expression: MIT" in metadata
    version = info.removesuffix(".dist-info").split("-")[1]
    assert said_by_the_command(wheel) == f"ckpt-engine {version}"
    sys.stdout.write(
        f"{wheel.name}: {len(code)} files, {sum(map(len, ENTRY_POINTS.values()))} entry points\n"
    )


def expected_files() -> set[str]:
    """Every file of the packages that git would keep."""
    return {
        f"{package}/{path.relative_to(source)}"
        for package, source in SOURCES.items()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def said_by_the_command(wheel: Path) -> str:
    """`ckpt-engine --version`, installed from the wheel, with none of this checkout on its path."""
    with tempfile.TemporaryDirectory() as target:
        pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "--no-deps"]
        subprocess.run([*pip, "--target", target, str(wheel)], check=True)
        environment = os.environ | {"PYTHONPATH": target}
        code = (
            "import ckpt_engine; from ckpt_engine.cli.main import main; print(ckpt_engine.__file__); main()"
        )
        command = [sys.executable, "-c", code, "--version"]
        done = subprocess.run(
            command, cwd=target, env=environment, check=True, capture_output=True, text=True, timeout=120
        )
        file, said = done.stdout.splitlines()
        assert Path(file).is_relative_to(target), file
        assert (Path(target) / "bin/ckpt-engine").is_file()
        return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
