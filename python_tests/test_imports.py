"""Imports point down, and nothing heavy or optional is imported before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import epi_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "epi_kernels"
PYPROJECT = ROOT / "pyproject.toml"

# A module imports only from its own row or from rows above it in this table.
LEVELS = [
    ["reference", "architectures", "curves", "footprint", "published", "files", "markdown", "scores", "text"],
    ["backends"],
    ["policies"],
    ["distributed"],
    ["optim"],
    ["training", "provenance", "workers"],
    ["isolation", "integrations", "finetune", "planner", "report", "demo"],
    ["repro"],
    ["cli", "env", "memory", "kernels_report", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Modules that import the tool they are for, which brings along what else they import.
TOOLS = {
    "axolotl.py": {"axolotl", "pydantic"},
    "lora.py": {"peft"},
    "llamafactory.py": {"llamafactory"},
    "llamafactory_v0.py": {"llamafactory"},
    "torchtitan.py": {"torchtitan"},
}

# What a distribution is imported as, where the names differ.
IMPORTED_AS = {"pyyaml": "yaml"}

# Compiled libraries are reached from any level, as torch is.
COMPILED = {"_C", "_C_cuda"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, those inside functions too."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def level_of(dotted: str) -> int | None:
    """Level of an imported name; None when it is not ours, or is the bare package."""
    parts = dotted.split(".")
    if parts[0] != "epi_kernels" or len(parts) == 1 or parts[1] in COMPILED:
        return None
    if parts[1] in epi_kernels._LAZY:
        parts = epi_kernels._LAZY[parts[1]].split(".")
    if parts[1] == "__version__":
        return None
    return LEVEL[parts[1]]


def test_every_module_has_a_level():
    tops = {module_name(path)[1] for path in modules() if len(module_name(path)) > 1}
    assert tops <= LEVEL.keys(), f"give these a row in LEVELS: {sorted(tops - LEVEL.keys())}"


def test_imports_point_down():
    upward = []
    for path in modules():
        name = module_name(path)
        if len(name) == 1:  # epi_kernels/__init__.py: the public names, all lazy
            continue
        own = LEVEL[name[1]]
        for line, imported in imports(path):
            level = level_of(imported)
            if level is not None and level > own:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert not upward, "\n".join(upward)


def test_the_package_root_imports_nothing_of_itself_at_run_time():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module}
    assert names <= {"__future__", "importlib", "typing"}


def test_third_party_imports_are_declared_dependencies():
    # A TOML array of strings is a Python list; tomllib is not in Python 3.10.
    (block,) = re.findall(r"^dependencies = (\[.*?^\])", PYPROJECT.read_text(), re.MULTILINE | re.DOTALL)
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in ast.literal_eval(block)}
    assert "torch" in declared
    declared = {IMPORTED_AS.get(name, name) for name in declared}
    undeclared = {}
    for path in modules():
        own = TOOLS.get(path.name, set()) if {"integrations", "repro"} & set(path.parts) else set()
        for line, imported in imports(path):
            top = imported.split(".")[0]
            if top == "epi_kernels" or top in sys.stdlib_module_names:
                continue
            if top.lower() not in declared | own:
                undeclared.setdefault(top, f"{path.relative_to(ROOT)}:{line}")
    assert not undeclared, f"not in pyproject.toml's dependencies: {undeclared}"


# Finders that find nothing for the blocked names, just as if they were not installed.
BLOCKER = """
import importlib.util, sys
BLOCKED = {blocked!r}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED):
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert not any(importlib.util.find_spec(name) for name in BLOCKED if "." not in name)
"""

OPTIONAL = [
    "epi_kernels._C",
    "epi_kernels._C_cuda",
    "jinja2",
    "matplotlib",
    "safetensors",
    "tqdm",
    "transformers",
    "triton",
]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.parametrize(
    "module", ["epi_kernels", "epi_kernels.optim", "epi_kernels.backends", "epi_kernels.isolation"]
)
def test_import_works_without_optional_parts(module):
    code = BLOCKER.format(blocked=OPTIONAL) + f"import {module}\nprint('imported')"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "imported"
    assert done.stderr == ""


def test_optimizer_runs_without_optional_parts():
    code = BLOCKER.format(blocked=OPTIONAL) + (
        "import torch\n"
        "from epi_kernels import MaskedEMAAdamW\n"
        "w = torch.nn.Parameter(torch.ones(64))\n"
        "optimizer = MaskedEMAAdamW([w], mask_interval=1)\n"
        "w.grad = torch.arange(64.)\n"
        "optimizer.step()\n"
        "assert not torch.equal(w.detach(), torch.ones(64))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_bare_import_and_help_load_no_torch():
    code = (
        "import sys, epi_kernels, epi_kernels.cli\n"
        "epi_kernels.cli.build_parser().format_help()\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'triton') if m in sys.modules])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert set(epi_kernels._LAZY) <= set(epi_kernels.__all__) <= set(dir(epi_kernels))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = epi_kernels.nonsense
