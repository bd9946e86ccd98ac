"""The Python definitions that a function reaches, and a hash of them that knows no names of files or modules.

A definition is what one name of a module stands for: a function, a class, a constant. It reaches what its
body names: through imports (those inside functions too), as attributes of imported modules, and, by
``torch.ops.hope_kernels.NAME``, the statements that register that operator. Attributes of objects are not
followed: a class counts as a whole, and only where it is named.

Hashed is the syntax tree without comments, docstrings, annotations and positions. A name that stands for
another definition is replaced by that definition's own hash, so that neither moving, renaming nor
re-exporting it changes anything, nor does the merging of equal copies. A constant made of ``__file__`` says
where something is and does not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGE = "hope_kernels"
OTHERS = ("setup", "tools.build_cuda")  # modules beside the package that decide what is compiled, and how
OPERATORS = f"torch.ops.{PACKAGE}."
ROUNDS = 3  # of replacing names by hashes; one round sees what is called, the next what that calls
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)
NAMED = (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Ref(NamedTuple):
    """A definition. name "": the module itself; "!3": its statement 3, which binds no name. module
    "torch.ops": all statements that register the operator ``name``."""

    module: str
    name: str = ""


class Outside(str):
    """A name of another package, with its dots."""


class Module:
    """What the names of one module stand for."""

    def __init__(self, name: str, path: Path):
        self.name, self.is_package = name, path.name == "__init__.py"
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, tuple[str, str]] = {}  # name -> (module, name in it or "")
        self.unnamed: list[ast.stmt] = []  # registrations of operators, and other statements for their effect
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            self._add(statement)

    def _add(self, s: ast.stmt) -> None:
        if isinstance(s, (ast.Import, ast.ImportFrom)):
            self.imports.update(self.imported(s))
            return
        names = list(bound_by(s))
        for inner in ast.walk(s) if isinstance(s, (ast.If, ast.Try)) else ():
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                self.imports.update(self.imported(inner))
        if isinstance(s, ast.Expr) or isinstance(s, ast.For) or names == ["_"] or not names:
            self.unnamed.append(s)
        for name in names:
            self.definitions.setdefault(name, []).append(s)

    def imported(self, s: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
        """What an import binds."""
        if isinstance(s, ast.Import):
            return {a.asname or a.name.split(".")[0]: (a.name if a.asname else a.name.split(".")[0], "")
                    for a in s.names}
        base = s.module or ""
        if s.level:
            parts = self.name.split(".")
            parts = parts[: len(parts) - s.level + self.is_package]
            base = ".".join([*parts, *([s.module] if s.module else [])])
        return {a.asname or a.name: (base, a.name) for a in s.names}


def bound_by(s: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module or of a body binds, imports aside."""
    return filter(None, map(bound, inside(s)))


def bound(node: ast.AST) -> str | None:
    """The name that a node itself binds, imports aside."""
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else None
    return node.name if isinstance(node, NAMED) else None


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is below it in the same scope; functions and classes in it are given, not entered."""
    yield node
    if isinstance(node, SCOPES):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, COMPREHENSIONS):  # its own variables stay in it, those of := do not
            yield from (n.target for n in ast.walk(child) if isinstance(n, ast.NamedExpr))
        else:
            yield from inside(child)


class Tree:
    """The modules of a repository at ``root``."""

    def __init__(self, root: Path):
        self._paths = dict(module_files(root))
        self._modules: dict[str, Module] = {}
        self._tokens: dict[Ref, list[str | Ref]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def module(self, name: str) -> Module | None:
        if name not in self._modules and name in self._paths:
            self._modules[name] = Module(name, self._paths[name])
        return self._modules.get(name)

    def find(self, module: str, name: str) -> Ref | Outside:
        """What ``from module import name`` gives."""
        if (found := self.module(module)) is None:
            return Outside(f"{module}.{name}" if name else module)
        if not name:
            return Ref(module)
        if found.imports.get(name, (module, name)) != (module, name):
            return self.find(*found.imports[name])
        if name in found.definitions:
            return Ref(module, name)
        return Ref(f"{module}.{name}") if f"{module}.{name}" in self._paths else Outside(name)

    def entry(self, text: str) -> Ref:
        """"module:name", or "module" for all of it, from inside the package. Raises LookupError."""
        module, _, name = text.partition(":")
        names = [n for n in (f"{PACKAGE}.{module}" if module else PACKAGE, module) if n in self._paths]
        found = self.find(names[0], name) if names else None
        if not isinstance(found, Ref):
            raise LookupError(f"{text} is not there, an entry point of a case in benchmarks/sources.py")
        return found

    def tokens(self, ref: Ref) -> list[str | Ref]:
        """A definition as text and references."""
        if ref not in self._tokens:
            self._tokens[ref] = list(self._make(ref))
        return self._tokens[ref]

    def _make(self, ref: Ref) -> Iterator[str | Ref]:
        if ref.module == "torch.ops":
            yield "operator"
            yield from self._registrations.get(ref.name, ())
            return
        module = self.module(ref.module)
        assert module is not None
        if not ref.name:
            yield "module"
            yield from (Ref(ref.module, name) for name in module.definitions if name != "_")
            yield from (Ref(ref.module, f"!{i}") for i in range(len(module.unnamed)))
            return
        unnamed = ref.name.startswith("!")
        writer = Writer(self, module, "" if unnamed else ref.name)
        for statement in [module.unnamed[int(ref.name[1:])]] if unnamed else module.definitions[ref.name]:
            if not is_place(statement):
                writer.write(statement)
        yield from writer.out

    @cached_property
    def _registrations(self) -> dict[str, list[Ref]]:
        """The statements that name an operator: "hope_kernels::scan", "scan" or "scan(Tensor x) -> Tensor"."""
        found: dict[str, list[Ref]] = {}
        for name in self._paths:
            module = self.module(name)
            for i, s in enumerate(module.unnamed if module else ()):
                texts = {str(c.value) for c in ast.walk(s) if isinstance(c, ast.Constant)}
                for operator in {t.removeprefix(f"{PACKAGE}::").split("(")[0] for t in texts}:
                    found.setdefault(operator, []).append(Ref(name, f"!{i}"))
        return found

    def reached(self, entries: Iterable[str], cut: tuple[str, ...] = ()) -> set[Ref]:
        """All definitions that ``entries`` reach, modules matching ``cut`` aside."""
        left, seen = [self.entry(e) for e in entries], set()
        while left:
            ref = left.pop()
            if ref in seen or is_cut(ref.module, cut):
                continue
            seen.add(ref)
            left += [t for t in self.tokens(ref) if isinstance(t, Ref)]
        return seen

    def hashes(self, entries: Iterable[str], cut: tuple[str, ...] = ()) -> set[str]:
        """One hash for every definition reached."""
        refs = self.reached(entries, cut)
        labels = {ref: "" for ref in refs}
        for _ in range(ROUNDS):
            labels = {ref: self._label(ref, labels) for ref in refs}
        return {label for ref, label in labels.items() if ref.name and ref.module != "torch.ops"}

    def _label(self, ref: Ref, labels: dict[Ref, str]) -> str:
        if not ref.name or ref.module == "torch.ops":  # what it gathers is reached and hashed by itself
            return "gathered"
        texts = ("\1" + labels.get(t, "cut") if isinstance(t, Ref) else t for t in self.tokens(ref))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(module, file) of the package and of ``OTHERS``."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    for name in OTHERS:
        if (path := root / (name.replace(".", "/") + ".py")).is_file():
            yield name, path


def is_place(s: ast.stmt) -> bool:
    """Whether a constant says where a file is, from ``__file__``: another place for a module that moves."""
    return isinstance(s, (ast.Assign, ast.AnnAssign)) and any(
        isinstance(node, ast.Name) and node.id == "__file__" for node in ast.walk(s)
    )


@cache
def is_cut(module: str, cut: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in cut)


class Writer:
    """Writes statements of a module as text and references, to ``out``. own: the name they define."""

    def __init__(self, tree: Tree, module: Module, own: str):
        self.tree, self.module, self.own, self.out = tree, module, own, []
        # (whether of a class, name -> import or None)
        self.scopes: list[tuple[bool, dict[str, tuple[str, str] | None]]] = []

    # -- names -----------------------------------------------------------------------------------------------

    def scope(self, body: list[ast.stmt], arguments: ast.arguments | None = None) -> dict:
        """What the names bound in a body stand for: an import, or None for a variable."""
        found: dict[str, tuple[str, str] | None] = {}
        everywhere: set[str] = set()
        if arguments is not None:
            every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            found |= {a.arg: None for a in (*every, arguments.vararg, arguments.kwarg) if a is not None}
        for node in (node for statement in body for node in inside(statement)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= self.module.imported(node)
            elif isinstance(node, ast.Global):
                everywhere |= set(node.names)
            elif name := bound(node):
                found[name] = None
        return {name: target for name, target in found.items() if name not in everywhere}

    def meaning(self, name: str) -> Ref | Outside | None:
        """What a name stands for here; None for a variable."""
        for depth, (of_class, names) in enumerate(reversed(self.scopes)):
            if name in names and not (of_class and depth):
                target = names[name]
                return None if target is None else self.tree.find(*target)
        if name in self.module.imports or name in self.module.definitions:
            return self.tree.find(self.module.name, name)
        return Outside(name)

    # -- statements and expressions --------------------------------------------------------------------------

    def write(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)):
            return
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            self._function(node)
        elif isinstance(node, ast.ClassDef):
            self._class(node)
        elif isinstance(node, COMPREHENSIONS):
            names = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
            self.scopes.append((False, dict.fromkeys(names)))
            self._fields(node)
            self.scopes.pop()
        elif isinstance(node, (ast.Name, ast.Attribute)):
            self._name(node)
        elif isinstance(node, ast.AnnAssign):
            self.out.append("Assign")
            self.write(node.target)
            self.write(node.value) if node.value is not None else self.out.append("no value")
        else:
            self._fields(node)

    def _fields(self, node: ast.AST) -> None:
        self.out.append("(" + type(node).__name__)
        for name, value in ast.iter_fields(node):
            if name in ("ctx", "kind", "type_comment", "type_ignores"):
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.AST):
                    self.write(item)
                else:
                    self.out.append(f"{type(item).__name__} {item!r}")
            self.out.append(",")
        self.out.append(")")

    def _body(self, body: list[ast.stmt]) -> None:
        for i, statement in enumerate(body):
            text = statement.value if isinstance(statement, ast.Expr) else None
            if i or not (isinstance(text, ast.Constant) and isinstance(text.value, str)):  # no docstring
                self.write(statement)

    def _called(self, name: str) -> None:
        """The name of a function or class, where it is not the definition itself."""
        if self.scopes:
            self.out.append(f"name {name}")

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self.out.append("(" + type(node).__name__)
        a, is_lambda = node.args, isinstance(node, ast.Lambda)
        if not is_lambda:
            self._called(node.name)
            for decorator in node.decorator_list:
                self.write(decorator)
        for kind in ("posonlyargs", "args", "kwonlyargs"):
            self.out.append(kind)
            self.out += [f"name {x.arg}" for x in getattr(a, kind)]
        self.out.append(f"* {a.vararg and a.vararg.arg} ** {a.kwarg and a.kwarg.arg}")
        for default in (*a.defaults, *a.kw_defaults):
            self.write(default) if default is not None else self.out.append("no default")
        body = [ast.Expr(node.body)] if is_lambda else node.body
        self.scopes.append((False, self.scope(body, a)))
        self.write(node.body) if is_lambda else self._body(body)
        self.scopes.pop()
        self.out.append(")")

    def _class(self, node: ast.ClassDef) -> None:
        self.out.append("(ClassDef")
        self._called(node.name)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.write(part)
        self.scopes.append((True, self.scope(node.body)))
        self._body(node.body)
        self.scopes.pop()
        self.out.append(")")

    def _name(self, node: ast.Name | ast.Attribute) -> None:
        attributes: list[str] = []
        base: ast.AST = node
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if not isinstance(base, ast.Name):
            self.write(base)
        elif (found := self.meaning(base.id)) is None:
            self.out.append(f"name {base.id}")
        elif isinstance(base.ctx, ast.Store):
            self.out.append("this" if base.id == self.own else "another")
        else:
            self._resolved(found, attributes)
        self.out += [f".{attribute}" for attribute in attributes]

    def _resolved(self, found: Ref | Outside, attributes: list[str]) -> None:
        """What a name stands for; takes from ``attributes`` what leads there."""
        while isinstance(found, Ref) and not found.name and attributes:
            inner = self.tree.find(found.module, attributes[0])
            if isinstance(inner, Outside):
                self.out.append("attribute of a module")
                return
            found = inner
            del attributes[0]
        if isinstance(found, Outside):
            full = ".".join([found, *attributes])
            if full.startswith(OPERATORS):
                found = Ref("torch.ops", full.removeprefix(OPERATORS).split(".")[0])
                del attributes[: attributes.index(found.name) + 1]
        self.out.append(found if isinstance(found, Ref) else f"outside {found}")
