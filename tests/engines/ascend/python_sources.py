"""Python packages read as text, from a wheel or a folder: parameters and names; nothing is imported.

    sources = Sources(Path("torch_npu-2.13.0-....whl"))
    sources.parameters("torch_npu.npu.synchronize")          # "(device=)"

A parameter with a default ends with `=`, whatever the default is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard
from zipfile import ZipFile

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A definition, and the module in which it stands. `node` is None for what no Python file defines."""

    module: str
    node: ast.AST | None


class Sources:
    """The `.py` files of a wheel, or below a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._trees: dict[str, ast.Module] = {}

    @cached_property
    def _texts(self) -> dict[str, str]:
        if self.place.is_dir():
            return {str(file.relative_to(self.place)): file.read_text() for file in self.place.rglob("*.py")}
        with ZipFile(self.place) as wheel:
            return {name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")}

    @property
    def files(self) -> Iterable[str]:
        """Paths such as `vllm/config.py`."""
        return self._texts.keys()

    def text(self, file: str) -> str:
        return self._texts[file]

    def metadata(self) -> str:
        """A wheel's own description."""
        with ZipFile(self.place) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
            return wheel.read(name).decode()

    def file_of(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in self.files), None)

    def tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.parse(self.text(file))
        return self._trees[file]

    def find(self, dotted: str) -> Found | None:
        """What `dotted` names, through imports and base classes; None: there is no such name."""
        parts = dotted.split(".")
        for end in range(len(parts), 0, -1):
            module = ".".join(parts[:end])
            if self.file_of(module):
                return self._in_module(module, parts[end:])
        return None

    def _in_module(self, module: str, names: list[str]) -> Found | None:
        file = self.file_of(module)
        if file is None:
            return None
        if not names:
            return Found(module, self.tree(file))
        for statement in _statements(self.tree(file)):
            if _defines(statement, names[0]):
                return self._in_definition(Found(module, statement), names[1:])
            if isinstance(statement, ast.ImportFrom):
                found = self._imported(statement, module, names)
                if found:
                    return found
        return self._in_module(f"{module}.{names[0]}", names[1:])

    def _imported(self, statement: ast.ImportFrom, module: str, names: list[str]) -> Found | None:
        origin = statement.module or ""
        if statement.level:
            is_package = (self.file_of(module) or "").endswith("__init__.py")
            above = module.split(".")
            above = above[: len(above) + is_package - statement.level]
            origin = ".".join([*above, origin]).rstrip(".")
        for alias in statement.names:
            if names[0] == (alias.asname or alias.name):
                return self.find(".".join([origin, alias.name, *names[1:]])) or Found(origin, None)
            if alias.name == "*" and origin != module:
                found = self._in_module(origin, names)
                if found:
                    return found
        return None

    def _in_definition(self, found: Found, names: list[str]) -> Found | None:
        if not names:
            return found
        if not isinstance(found.node, ast.ClassDef):
            return None
        for statement in _statements(found.node):
            if _defines(statement, names[0]):
                return self._in_definition(Found(found.module, statement), names[1:])
        for base in self._bases(found):
            inherited = self._in_definition(base, names)
            if inherited:
                return inherited
        return None

    def _bases(self, found: Found) -> Iterator[Found]:
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            at = self._in_module(found.module, ast.unparse(base).split("."))
            if at is not None and at.node is not None:
                yield at

    def parameters(self, dotted: str) -> str | None:
        """Those of a function, or of a class' constructor without `self`; None: there is no such name, or
        Python code does not define it."""
        found = self.find(dotted)
        if found is None or found.node is None:
            return None
        if isinstance(found.node, ast.ClassDef):
            return self._of_constructor(found)
        if not isinstance(found.node, Function):
            return None
        above = self.find(dotted.rpartition(".")[0])
        is_method = above is not None and isinstance(above.node, ast.ClassDef)
        return text_of(found.node, skip=1 if is_method and not _is_static(found.node) else 0)

    def _of_constructor(self, found: Found) -> str | None:
        assert isinstance(found.node, ast.ClassDef)
        if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
            fields = [s for s in found.node.body if isinstance(s, ast.AnnAssign)]
            return "(" + ", ".join(ast.unparse(f.target) + ("=" if f.value else "") for f in fields) + ")"
        for name in ("__init__", "__new__"):
            made = self._in_definition(found, [name])
            if made is not None and isinstance(made.node, Function):
                return text_of(made.node, skip=1)
        return "()"

    def names_of_class(self, dotted: str) -> set[str]:
        """All that instances of the class have by its own code: methods, attributes, and what methods set."""
        found = self.find(dotted)
        assert found is not None, dotted
        assert isinstance(found.node, ast.ClassDef), dotted
        names: set[str] = set()
        for statement in _statements(found.node):
            names |= _bound(statement)
        for node in ast.walk(found.node):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) == "self" else set()
        for base in self._bases(found):
            assert isinstance(base.node, ast.ClassDef)
            names |= self.names_of_class(f"{base.module}.{base.node.name}")
        return names

    def calls(self, name: str) -> set[str]:
        """How the package itself calls `name`, or `anything.name`: `(_, _, device=_)`."""
        shapes = set()
        for file in sorted(self.files):
            if f"{name}(" in self.text(file):
                shapes |= {shape for called, shape in calls_in(self.tree(file)) if called == name}
        return shapes


def calls_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each call's name, and its shape; but for calls with `*` or `**`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if "*" not in shape_of(node):
                yield called, shape_of(node)


def shape_of(call: ast.Call) -> str:
    """`(_, _, device=_)`."""
    positional = ["*_" if isinstance(argument, ast.Starred) else "_" for argument in call.args]
    named = [f"{keyword.arg}=_" if keyword.arg else "**_" for keyword in call.keywords]
    return f"({', '.join([*positional, *named])})"


def text_of(function: Function, skip: int) -> str:
    """`(a, b=, *, c=, **d)`, without the first `skip` ones."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    optional = len(positional) - len(given.defaults)
    shown = [argument.arg + ("=" if at >= optional else "") for at, argument in enumerate(positional)][skip:]
    if given.vararg:
        shown.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        shown.append("*")
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        shown.append(argument.arg + ("=" if default is not None else ""))
    if given.kwarg:
        shown.append(f"**{given.kwarg.arg}")
    return f"({', '.join(shown)})"


def fits(shape: str, parameters: str) -> bool:
    """Whether a call of this shape is one that these parameters take."""
    given = [part for part in shape.strip("()").split(", ") if part]
    named = {part.split("=")[0] for part in given if part != "_"}
    wanted = [part for part in parameters.strip("()").split(", ") if part]
    starred = next((at for at, part in enumerate(wanted) if part.startswith("*")), len(wanted))
    places = [part.rstrip("=") for part in wanted[:starred]]
    count = given.count("_")
    any_count = any(part.startswith("*") and not part.startswith("**") and part != "*" for part in wanted)
    known = {part.rstrip("=") for part in wanted if not part.startswith("*")}
    if count > len(places) and not any_count:
        return False
    if not (named <= known or any(part.startswith("**") for part in wanted)):
        return False
    filled = named | set(places[:count])
    needed = {part for part in wanted if not part.endswith("=") and not part.startswith("*")}
    return needed <= filled and not named & set(places[:count])


def _statements(node: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Its own, also those under `if` and `try`."""
    left = list(node.body)
    while left:
        statement = left.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            handlers = [handler.body for handler in getattr(statement, "handlers", [])]
            left = [*statement.body, *statement.orelse, *(s for body in handlers for s in body), *left]


def _bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, Function | ast.ClassDef):
        return {statement.name}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _defines(statement: ast.stmt, name: str) -> TypeGuard[ast.stmt]:
    return name in _bound(statement)


def _is_static(function: Function) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
