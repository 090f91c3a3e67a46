"""Question-answer pairs from the documentation of Python's own standard library, as JSONL.

    python tools/make_stdlib_qa.py stdlib.jsonl            # prompt and completion, one pair a line
    python tools/make_stdlib_qa.py stdlib.jsonl --limit 50

The answers are the first paragraphs of docstrings. The same Python gives the same file: names are sorted, nothing
is random, and docstrings that hold addresses or paths of this machine are left out. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType

# Importing these opens a browser, prints, needs a display, or brings test code along.
LEFT_OUT = {
    "antigravity",
    "this",
    "idlelib",
    "test",
    "tkinter",
    "turtle",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "msilib",
    "distutils",
}
SHORTEST, LONGEST = 25, 600  # characters of an answer
SUBMODULES = ("asyncio", "collections.abc", "concurrent.futures", "email.message", "http.client", "http.server", "importlib.metadata",
              "importlib.resources", "json.decoder", "json.encoder", "logging.handlers", "multiprocessing.pool", "os.path", "unittest.mock",
              "urllib.parse", "urllib.request", "wsgiref.util", "xml.dom.minidom", "xml.etree.ElementTree", "zipfile")  # fmt: skip
KINDS = {
    "module": "What is Python's module `{name}` for?",
    "class": "What is the class `{name}` in Python's standard library?",
    "exception": "When is `{name}` used in Python?",
    "function": "What does the function `{name}` do in Python?",
    "method": "What does the method `{name}` do in Python?",
}


def first_paragraph(doc: object, name: str) -> str:
    """The first paragraph of prose; empty when there is none worth learning."""
    if not isinstance(doc, str):
        return ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = paragraph.strip().splitlines()
        # A signature line that C functions put first, "dumps(obj, ...) -> str", is no answer.
        while lines and re.match(rf"^{re.escape(name.rsplit('.', 1)[-1])}\(.*\)\s*(->|$)", lines[0]):
            lines.pop(0)
        text = " ".join(line.strip() for line in lines)
        if SHORTEST <= len(text) <= LONGEST and not text.startswith((">>>", "|", "-", "=", "usage:")):
            return "" if re.search(r"0x[0-9a-f]{6,}|/home/|/root/|/usr/lib|site-packages", text) else text
    return ""


def load(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception:  # a module of another platform, or one that was not built
        return None


def public(owner: object) -> Iterator[tuple[str, object]]:
    names = getattr(owner, "__all__", None) if isinstance(owner, ModuleType) else vars(owner)
    for name in sorted(set(names if names is not None else vars(owner))):
        if not name.startswith("_"):
            try:
                yield (
                    name,
                    inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name),
                )
            except AttributeError:
                continue


def pairs() -> Iterator[tuple[str, str]]:
    """(question, answer), every answer once."""
    seen: set[str] = set()

    def ask(kind: str, name: str, thing: object) -> Iterator[tuple[str, str]]:
        answer = first_paragraph(getattr(thing, "__doc__", None), name)
        if answer and answer not in seen:
            seen.add(answer)
            yield KINDS[kind].format(name=name), answer

    for module_name in sorted({*sys.stdlib_module_names, *SUBMODULES}):
        if module_name.startswith("_") or module_name.split(".")[0] in LEFT_OUT:
            continue
        module = load(module_name)
        if module is None:
            continue
        yield from ask("module", module_name, module)
        for name, thing in public(module):
            full = f"{module_name}.{name}"
            # Where a name is re-exported, its home tells about it.
            if getattr(thing, "__module__", module_name) not in (
                module_name,
                f"_{module_name}",
                "builtins",
                None,
            ):
                continue
            if inspect.isclass(thing):
                yield from ask("exception" if issubclass(thing, BaseException) else "class", full, thing)
                for method, function in public(thing):
                    if inspect.isroutine(function):
                        yield from ask("method", f"{full}.{method}", function)
            elif inspect.isroutine(thing):
                yield from ask("function", full, thing)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", help="JSONL file to write")
    parser.add_argument(
        "--limit", type=int, help="write at most this many pairs, spread over the whole library"
    )
    args = parser.parse_args()
    every = list(pairs())
    if args.limit and args.limit < len(every):
        every = [every[index * len(every) // args.limit] for index in range(args.limit)]
    with open(args.out, "w", encoding="utf-8") as file:
        for prompt, completion in every:
            file.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(every)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
