"""Where the values of a Python program's variables come from, as CodeBLEU compares it (arXiv 2009.10297, section 3.3)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

Place = tuple[int, int]  # line, column
Token = tuple[str, Place]
States = dict[str, list[Place]]  # name -> where its value may have come from
Edge = tuple[str, str, tuple[str, ...]]  # variable, relation, variables its value comes from


@dataclass
class _Item:
    name: str
    relation: str
    sources: dict[Place, str] = field(default_factory=dict)


def flow(tree: ast.AST) -> list[Edge]:
    """Edges in the order of the program, with names replaced by var_0, var_1, ... in order of appearance."""
    walk = _Walk()
    walk.visit(tree, {})
    used = {place for item in walk.items.values() for place in item.sources}
    names: dict[str, str] = {}
    edges = []
    for place, item in sorted(walk.items.items()):
        if not item.sources and place not in used:
            continue
        sources = dict.fromkeys(name for _, name in sorted(item.sources.items()))
        for name in (*sources, item.name):
            names.setdefault(name, f"var_{len(names)}")
        edges.append((names[item.name], item.relation, tuple(names[name] for name in sources)))
    return edges


def _own_token(node: ast.AST) -> Token | None:
    """The name or constant that the node itself stands for."""
    match node:
        case ast.Name():
            return node.id, (node.lineno, node.col_offset)
        case ast.Constant() | ast.JoinedStr():
            return ast.unparse(node), (node.lineno, node.col_offset)
        case ast.Attribute():
            return node.attr, (node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr.encode()))
        case ast.arg() | ast.keyword() if node.arg:
            return node.arg, (node.lineno, node.col_offset)
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name, (node.lineno, node.col_offset)
        case ast.ExceptHandler() if node.name:
            return node.name, (node.lineno, node.col_offset)
        case ast.alias():
            return node.asname or node.name, (node.lineno, node.col_offset)
    return None


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.JoinedStr):  # a constant here, as strings are
        yield from ast.iter_child_nodes(node)


def _tokens(node: ast.AST) -> list[Token]:
    """Names and constants in a node, in order."""
    found = [token for part in _inside(node) if (token := _own_token(part))]
    return sorted(found, key=lambda token: token[1])


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in _children(node):
        yield from _inside(child)


def _pairs(target: ast.AST, value: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """a, b = 1, 2 is two assignments."""
    both = (ast.Tuple, ast.List)
    if isinstance(target, both) and isinstance(value, both) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts))
    return [(target, value)]


class _Walk:
    """Goes through a program with the states of its variables; a loop's body is gone through twice."""

    def __init__(self) -> None:
        self.items: dict[Place, _Item] = {}

    def add(self, token: Token, relation: str, sources: list[Token]) -> None:
        name, place = token
        item = self.items.setdefault(place, _Item(name, relation))
        item.sources.update({place: name for name, place in sources})

    def assign(self, target: ast.AST, value: ast.AST, states: States) -> None:
        for left, right in _pairs(target, value):
            sources = _tokens(right)
            for token in _tokens(left):
                self.add(token, "computedFrom", sources)
                states[token[0]] = [token[1]]

    def visit(self, node: ast.AST | list, states: States) -> States:
        """The states after the node."""
        match node:
            case list():
                for one in node:
                    states = self.visit(one, states)
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign() if node.value is not None:
                states = self.visit(node.value, states)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, node.value, states)
            case ast.For() | ast.AsyncFor():
                for _ in range(2):
                    states = self.visit(node.iter, states)
                    self.assign(node.target, node.iter, states)
                    states = self.visit(node.body, states)
                states = self.visit(node.orelse, states)
            case ast.While():
                for _ in range(2):
                    states = self.visit([node.test, *node.body], states)
                states = self.visit(node.orelse, states)
            case ast.If():
                states = self.visit(node.test, states)
                ends = [self.visit(branch, dict(states)) for branch in (node.body, node.orelse)]
                places = {
                    name: {place for end in ends for place in end.get(name, ())}
                    for end in ends
                    for name in end
                }
                states = {name: sorted(one) for name, one in places.items()}
            case ast.comprehension():
                states = self.visit(node.iter, states)
                self.assign(node.target, node.iter, states)
                states = self.visit(list(node.ifs), states)
            case ast.arguments():
                self.parameters(node, states)
            case _:
                self.use(node, states)
                first = [child for child in _children(node) if isinstance(child, ast.comprehension)]
                states = self.visit([*first, *(one for one in _children(node) if one not in first)], states)
        return states

    def use(self, node: ast.AST, states: States) -> None:
        if (token := _own_token(node)) is None:
            return
        name, place = token
        self.add(token, "comesFrom", [(name, source) for source in states.get(name, ())])
        if not isinstance(node, ast.Constant | ast.JoinedStr):
            states.setdefault(name, [place])

    def parameters(self, node: ast.arguments, states: States) -> None:
        plain = [*node.posonlyargs, *node.args]
        defaults = [None] * (len(plain) - len(node.defaults)) + list(node.defaults)
        extra = [(one, None) for one in (node.vararg, node.kwarg) if one]
        for one, default in [*zip(plain, defaults), *zip(node.kwonlyargs, node.kw_defaults), *extra]:
            token = (one.arg, (one.lineno, one.col_offset))
            if default is not None:
                self.visit(default, states)
            self.add(token, "comesFrom", _tokens(default) if default is not None else [])
            states[token[0]] = [token[1]]
