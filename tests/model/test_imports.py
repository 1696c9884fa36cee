"""No circle of imports, at a module's top or in a function; imports for types don't count."""

import ast
from pathlib import Path

import pytest

import vatt_fast
from vatt_fast import kernels

FOLDERS = {"vatt_fast": vatt_fast, "vatt_fast.kernels": kernels}


def modules(package: str) -> dict[str, Path]:
    root = Path(FOLDERS[package].__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        if package == "vatt_fast" and parts[1] == "kernels":
            continue
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


class Imports(ast.NodeVisitor):
    """The modules of ``known`` that a module names in its imports, without their parents."""

    def __init__(self, module: str, path: Path, known: set[str]):
        self.known, self.found = known, set()
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.visit(ast.parse(path.read_text()))

    def visit_If(self, node: ast.If) -> None:
        if getattr(node.test, "id", None) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names} & self.known

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            self.found |= {name if name in self.known else base} & self.known


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules on one circle; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for below in sorted(imports[module]):
            if found := walk(below, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


@pytest.mark.parametrize("package", FOLDERS)
def test_no_import_circle(package):
    paths = modules(package)
    imports = {name: Imports(name, path, set(paths)).found for name, path in paths.items()}
    assert len(imports) > 15 and sum(map(len, imports.values())) > 30
    assert not (found := circle(imports)), " -> ".join(found)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
