"""代码的约定，由语法树检查：导入方向、导入时什么也不做、中文说明、英文日志。"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [ROOT / name for name in ("preprocess.py", "train.py", "interact.py")]
PACKAGE = sorted((ROOT / "chitchat").rglob("*.py"))
SOURCES = [*SCRIPTS, *PACKAGE]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# 导入时可以调用的：类（大写开头），以及这些没有副作用的函数和方法。
PURE_CALLS = {
    *("set", "frozenset", "tuple", "list", "dict", "float", "int", "range", "len", "field"),
    *(
        "chr",
        *("enumerate", "_any_of", "map", "sorted", "escape", "fromkeys", "ord"),
        "isupper",
        "bounded",
        "getLogger",
        "compile",
        "join",
        "split",
        "resolve",
        "items",
        "lower",
        "fromkeys",
    ),
}
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)


def module_name(path: Path) -> str:
    """文件对应的模块名，例如 chitchat.tokens.vocabulary。"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """这个文件导入的本项目模块，函数里和 TYPE_CHECKING 下的也算。"""
    names = {module_name(source) for source in SOURCES}
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & names


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_package_never_imports_a_script(path):
    assert not imports_of(path) & {module_name(script) for script in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_imports_the_package_and_no_other_script(path):
    assert imports_of(path)
    assert all(name.startswith("chitchat") for name in imports_of(path))


# 哪一层可以导入哪些层；同一层之内随意，只要不成圈。
ARROWS = {
    "ground": set(),
    "tokens": {"ground"},
    "model": {"ground", "tokens"},
    "corpus": {"ground", "tokens"},
    "training": {"ground", "tokens", "model"},
    "chat": {"ground", "tokens", "model"},
}
LAYER_OF_MODULE = {
    **dict.fromkeys(
        ("errors", "cli", "files", "devices", "interrupts", "checksums", "visible"), "ground"
    ),
    **dict.fromkeys(
        ("architecture", "checkpoint", "chat_template", "hub", "model_card", "weights"), "model"
    ),
}


def layer_of(module: str) -> str:
    """模块属于哪一层：顶层的模块查表，其余看文件夹。"""
    name = module.split(".")[1]
    return LAYER_OF_MODULE.get(name, name)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: module_name(path))
def test_imports_follow_the_arrows(path):
    if module_name(path) == "chitchat":
        return
    layer = layer_of(module_name(path))
    used = {layer_of(name) for name in imports_of(path) - {"chitchat"}} - {layer}
    assert used <= ARROWS[layer]


def test_package_has_no_import_cycle():
    waiting = {module_name(path): imports_of(path) - {"chitchat"} for path in PACKAGE}
    while waiting:  # 每轮拿走已没有依赖的模块；拿不动了就是有圈
        free = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"cycle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


def statements_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """导入时就会执行的语句；函数体、__main__ 守卫和 TYPE_CHECKING 之下的不算。"""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from statements_at_import(node.body)
        elif isinstance(node, ast.If):
            guard = ast.unparse(node.test)
            assert guard in ("__name__ == '__main__'", "TYPE_CHECKING"), guard
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_source
def test_importing_only_defines_things(path):
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr, ast.Pass)
    for node in statements_at_import(TREES[path].body):
        assert isinstance(node, allowed), f"line {node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}: bare expression"
        later = {n for f in ast.walk(node) if isinstance(f, ast.Lambda) for n in ast.walk(f)}
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call) and n not in later):
            function = call.func
            name = function.attr if isinstance(function, ast.Attribute) else function.id
            assert name.lstrip("_")[0].isupper() or name in PURE_CALLS, (
                f"line {call.lineno}: {name}()"
            )


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """模块、公开的类和函数、公开的类的公开方法，以及各自的说明。"""
    yield "module", ast.get_docstring(tree)
    for node in public_members(tree):
        yield node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            for method in public_members(node):
                yield f"{node.name}.{method.name}", ast.get_docstring(method)


def public_members(parent: ast.Module | ast.ClassDef) -> list[ast.stmt]:
    """直接定义在其中、名字不以下划线开头的函数和类。"""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in parent.body if isinstance(node, kinds) and node.name[0] != "_"]


UNDOCUMENTED = {"LinearCrossEntropy.forward", "LinearCrossEntropy.backward"}  # 类的说明已写清


@each_source
def test_everything_public_is_explained_in_chinese(path):
    for name, docstring in public_definitions(TREES[path]):
        if name not in UNDOCUMENTED:
            assert docstring, name
            assert CHINESE.search(docstring), name


@each_source
def test_log_formats_are_ascii_and_lazy(path):
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    for node in ast.walk(TREES[path]):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_call and node.func.attr in levels and ast.unparse(node.func.value).endswith("logger"):
            log_format = node.args[0]
            assert isinstance(log_format, ast.Constant), f"line {node.lineno}: not a literal"
            assert log_format.value.isascii(), f"line {node.lineno}"
            assert log_format.value.count("%s") <= len(node.args) - 1


@each_source
def test_names_are_ascii(path):
    names = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    assert all(set(name) <= {*string.ascii_letters, *string.digits, "_"} for name in names)


@each_source
def test_assert_is_not_used_for_checks(path):
    assert not [node.lineno for node in ast.walk(TREES[path]) if isinstance(node, ast.Assert)]
