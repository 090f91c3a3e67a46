"""CodeBLEU (arXiv 2009.10297) of Python code, on the standard library's `ast`.

A quarter each: BLEU-4; the same of recalls, in which a Python keyword weighs 1 and any other word 0.2; the share of the
reference's syntax trees that the answer holds; the share of its data flow that the answer has. All are of the corpus,
not means over answers, and words are what white space parts, as in the script that was released with the paper. The two
n-gram parts equal the package codebleu 0.7.0, a port of that script. The package itself is not used: it needs a
tree-sitter grammar older than what pip installs beside it, and orders names by hash, which changes from run to run.

Where this differs from that script: trees and flow come from `ast` in place of tree-sitter, so that their values are close
but not equal; an answer that does not parse is judged by the longest run of its first lines that does; a reference that
is no Python counts in the n-gram parts only; where no reference has a data flow, the other parts share its weight (there
it counts as matched in full).
"""

from __future__ import annotations

import ast
import keyword
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .dataflow import flow

ORDER = 4
SMOOTHING = 0.1  # matches of an n-gram order that has none (method 1 of Chen and Cherry, 2014)
OTHER_WORDS = 0.2  # weight of a word that is no keyword
KEYWORDS = {*keyword.kwlist, "match", "case", "type"}
# Tree-sitter's trees, too, leave out which operator it is, and know no load and store.
LEFT_OUT = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)


@dataclass(frozen=True)
class CodeBleu:
    """The parts are from 0 to 1, None where no reference has what they compare; ``score`` is from 0 to 100."""

    ngram: float
    weighted_ngram: float
    syntax: float | None
    dataflow: float | None
    python: int  # references that parse

    @property
    def score(self) -> float:
        parts = [self.ngram, self.weighted_ngram, self.syntax, self.dataflow]
        there = [part for part in parts if part is not None]
        return 100 * sum(there) / len(there)


def codebleu(answers: Sequence[str], references: Sequence[str]) -> CodeBleu:
    """Of a corpus with one reference an answer."""
    words = [
        (answer.split(), reference.split()) for answer, reference in zip(answers, references, strict=True)
    ]
    trees = [(_first_lines(answer), _tree(reference)) for answer, reference in zip(answers, references)]
    compared = [(answer, reference) for answer, reference in trees if reference is not None]
    return CodeBleu(
        _brevity(words) * _shares(words, _precision),
        _shares(words, _weighted_recall),  # a recall is low for short answers as it is
        _share(_subtrees(answer, reference) for answer, reference in compared),
        _share(_flows(answer, reference) for answer, reference in compared),
        len(compared),
    )


def _brevity(words) -> float:
    """BLEU's penalty for answers shorter than the references."""
    ours, theirs = sum(len(answer) for answer, _ in words), sum(len(reference) for _, reference in words)
    return min(1.0, math.exp(1 - theirs / ours)) if ours else 0.0


def _shares(words, counts) -> float:
    """Geometric mean of the orders' shares. `counts` gives (matched, all) of one pair."""
    totals = [[0.0, 0.0] for _ in range(ORDER)]
    for answer, reference in words:
        for n, total in enumerate(totals, 1):
            matched, there = counts(_ngrams(answer, n), _ngrams(reference, n), n)
            total[0] += matched
            total[1] += max(1, there)
    if not totals[0][0]:
        return 0.0
    logs = [math.log((matched or SMOOTHING) / there) for matched, there in totals]
    return math.exp(sum(logs) / ORDER)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _precision(answer: Counter, reference: Counter, n: int) -> tuple[float, float]:
    return sum((answer & reference).values()), sum(answer.values())


def _weighted_recall(answer: Counter, reference: Counter, n: int) -> tuple[float, float]:
    def weight(ngram: tuple[str, ...]) -> float:
        return 1.0 if n > 1 or ngram[0] in KEYWORDS else OTHER_WORDS

    matched = sum(count * weight(ngram) for ngram, count in (answer & reference).items())
    return matched, sum(count * weight(ngram) for ngram, count in reference.items())


def _tree(code: str) -> ast.Module | None:
    """Without docstrings; None for what is no Python, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in somebody's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_docstring(one)]  # type: ignore[attr-defined]
    return tree if tree.body else None


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _first_lines(code: str) -> ast.Module | None:
    """The tree of the longest run of first lines that parses: an answer may be cut off, or go on in prose."""
    lines = code.split("\n")
    for count in range(len(lines), 0, -1):
        if (tree := _tree("\n".join(lines[:count]))) is not None:
            return tree
    return None


def _shapes(tree: ast.AST | None) -> list[tuple]:
    """The shape, kinds of nodes alone, of each subtree of more than one node."""
    shapes: list[tuple] = []

    def shape(node: ast.AST) -> tuple:
        children = tuple(
            shape(child) for child in ast.iter_child_nodes(node) if not isinstance(child, LEFT_OUT)
        )
        own = (type(node).__name__, *children)
        if children:
            shapes.append(own)
        return own

    if tree is not None:
        shape(tree)
    return shapes


def _subtrees(answer: ast.AST | None, reference: ast.AST) -> tuple[int, int]:
    there, wanted = set(_shapes(answer)), _shapes(reference)
    return sum(shape in there for shape in wanted), len(wanted)


def _flows(answer: ast.AST | None, reference: ast.AST) -> tuple[int, int]:
    wanted = Counter(flow(reference))
    found = Counter(flow(answer)) if answer is not None else Counter()
    return sum((wanted & found).values()), sum(wanted.values())


def _share(counts) -> float | None:
    matched, total = map(sum, zip((0, 0), *counts))
    return matched / total if total else None
