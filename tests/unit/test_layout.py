"""The house itself: packages that import, documents that agree with the code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt_engine
from ckpt_engine import errors
from ckpt_engine.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("ckpt_engine", "ckpt_engine_vllm", "ckpt_engine_sglang", "ckpt_engine_ascend")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("integrations/*/README.md")],
)
ENVIRONMENT_ROW = re.compile(r"^\| `([A-Z0-9_]+)` \| ([^|]*) \|", re.MULTILINE)
OUR_VARIABLE = re.compile(r"\b(?:CKPT_ENGINE|PS)_[A-Z0-9_]*[A-Z]\b")
HEAVY = ("fastapi", "httpx", "mooncake", "transformers", "typer")


def run_python(code: str, directory: Path) -> str:
    """Runs `code` in a fresh interpreter that sees installed packages only; what it printed."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def aliases() -> dict[str, object]:
    """Every environment variable of the settings, with its default."""
    found: dict[str, object] = {}
    for name, field in Settings.model_fields.items():
        choices = getattr(field.validation_alias, "choices", [field.validation_alias or name])
        found |= {str(choice): field.default for choice in choices if str(choice).isupper()}
    return found


def test_packages_import_from_any_directory(tmp_path: Path) -> None:
    out = run_python(
        f"import {', '.join(PACKAGES)}\nfor m in {', '.join(PACKAGES)}: print(m.__file__)", tmp_path
    )
    for package, file in zip(PACKAGES, out.splitlines(), strict=True):
        assert Path(file).parent.name == package
        assert (Path(file).parent / "py.typed").is_file()


def test_version_is_the_distributions() -> None:
    assert f'\nversion = "{ckpt_engine.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ckpt_engine.__all__)
def test_public_names_resolve(name: str) -> None:
    assert callable(getattr(ckpt_engine, name))
    assert name in dir(ckpt_engine)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ckpt_engine.no_such_name


def test_worker_imports_little(tmp_path: Path) -> None:
    out = run_python(
        "import sys, ckpt_engine.ipc.receiver, ckpt_engine.loading.completeness\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "print([name for name in sys.modules if name.startswith('ckpt_engine.')])",
        tmp_path,
    )
    heavy, ours = out.splitlines()
    assert heavy == "[]"
    for part in ("checkpoint", "cli", "parameter_server", "planning", "server", "transport", "update"):
        assert f"'ckpt_engine.{part}" not in ours


def test_readme_lists_every_environment_variable_with_its_default() -> None:
    section = (ROOT / "README.md").read_text().split("## Environment variables", 1)[1].split("\n## ", 1)[0]
    rows = dict(ENVIRONMENT_ROW.findall(section))
    assert rows.keys() == aliases().keys()
    for name, default in aliases().items():
        if default is not None:
            assert rows[name].split()[0] == f"`{default}`", name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_variables_that_are_read(document: Path) -> None:
    assert set(OUR_VARIABLE.findall(document.read_text())) <= aliases().keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_error_tree_in_the_docstring_is_the_class_tree() -> None:
    drawn: dict[str, tuple[str | None, set[str]]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"( *)[*·-] (\w+)(.*)", line)
        if match is None:
            continue
        indent, name, text = len(match[1]), match[2], match[3]
        while above and above[-1][0] >= indent:
            above.pop()
        also = set(re.findall(r"\(also an? (\w+)\)", text))
        drawn[name] = (above[-1][1] if above else None, also)
        above.append((indent, name))

    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.CkptEngineError) and kind.__module__ == errors.__name__
    }
    assert drawn.keys() == classes.keys()
    for name, kind in classes.items():
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, errors.CkptEngineError)]
        others = {base.__name__ for base in kind.__bases__} - {*ours, "Exception"}
        assert drawn[name] == (ours[0] if ours else None, others), name
