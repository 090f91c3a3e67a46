"""The README's compatibility table: every row names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
HEADER = "| with | what is promised | test, in `python_tests/` |"


def rows() -> list[list[str]]:
    lines = README.read_text(encoding="utf-8").splitlines()
    table = lines[lines.index(HEADER) + 2 :]
    end = next(i for i, line in enumerate(table) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def test_every_claim_of_the_compatibility_table_names_a_test_that_is_there():
    found = rows()
    assert len(found) >= 20
    for name, promise, tests in found:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named, f"{name}: {promise}"
        for file, test in named:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"{file} has no {test}"
