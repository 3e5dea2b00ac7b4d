"""The structure of the package: what imports what, what is called what, who knows what."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rosa_func

PACKAGE = Path(rosa_func.__file__).parent
TREES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): (
        ast.parse(path.read_text())
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
PACKAGES = {"rosa_func", "rosa_func.files", "rosa_func.weight"}
EVERY_FILE = pytest.mark.parametrize("file", TREES)

# Packages that are needed for some functions only, and imported in them.
OPTIONAL = {"huggingface_hub", "safetensors", "tqdm", "transformers"}
# Of what is not in files/ itself: the lowest rooms, which know nothing of states.
BELOW_FILES = {"rosa_func._torch", "rosa_func.extras", "rosa_func.keys", "rosa_func.modules"}
BRANCHES = {"frozen", "trainable", "input_dim", "fixed", "compensation", "model_dtype"}
# Names with an underscore that are not torch's: those of every NamedTuple, and one of transformers.
NOT_TORCHS = {"_asdict", "_fields", "_make", "_replace", "_from_config"}


def imports_in(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of all that is imported, modules where a name is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in TREES else str(node.module)


def functions_in(tree: ast.AST) -> list[ast.AST]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_of_python(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def public_objects() -> dict[str, Any]:
    """Return what users are told of, by its path: what the package names, and its modules hold."""
    found = {}
    for name in [*rosa_func.__all__, "trainer"]:
        value = getattr(rosa_func, name, None) or importlib.import_module(f"rosa_func.{name}")
        if not isinstance(value, ModuleType):
            found[name] = value
            continue
        for inner, member in vars(value).items():
            is_own = getattr(member, "__module__", "") == value.__name__
            if is_own and not inner.startswith("_") and callable(member):
                found[f"{name}.{inner}"] = member
    return found


PUBLIC = public_objects()
EVERY_PUBLIC_NAME = pytest.mark.parametrize("path", PUBLIC)


class TestImports:
    def test_arrows_go_one_way(self):
        graph = {
            file: {name for name in imports_in(tree) if name in TREES}
            for file, tree in TREES.items()
        }
        order = list(TopologicalSorter(graph).static_order())  # or a CycleError that names it
        assert set(order) == set(TREES)

    @EVERY_FILE
    def test_a_function_imports_optional_packages_alone(self, file: str):
        for function in functions_in(TREES[file]):
            for name in imports_in(function):
                assert name.partition(".")[0] in OPTIONAL, f"{file}:{function.lineno} {name}"

    @EVERY_FILE
    def test_weight_imports_torch_and_itself_only(self, file: str):
        if is_in(file, "rosa_func.weight"):
            for name in imports_in(TREES[file]):
                own = is_in(name, "rosa_func.weight") or name == "rosa_func._torch"
                outside = is_of_python(name) or name.partition(".")[0] in {"torch", "tensordict"}
                assert own or outside, name

    @EVERY_FILE
    def test_files_imports_nothing_above_it(self, file: str):
        if is_in(file, "rosa_func.files"):
            for name in imports_in(TREES[file]):
                if is_in(name, "rosa_func"):
                    assert is_in(name, "rosa_func.files") or name in BELOW_FILES, name


class TestNames:
    @EVERY_FILE
    def test_importing_a_file_by_its_path_gives_the_file(self, file: str):
        """Not a function of the same name that the package around it took in."""
        namespace: dict[str, Any] = {}
        exec(f"import {file} as found", namespace)
        assert isinstance(namespace["found"], ModuleType)
        assert namespace["found"].__name__ == file

    @EVERY_PUBLIC_NAME
    def test_no_file_has_the_name_of_a_public_function_or_of_its_arguments(self, path: str):
        stems = {file.rpartition(".")[2] for file in TREES}
        assert path.rpartition(".")[2] not in stems
        functions = [PUBLIC[path]]
        if inspect.isclass(PUBLIC[path]):
            functions = [f for f in vars(PUBLIC[path]).values() if inspect.isfunction(f)]
        for function in functions:
            assert not stems & inspect.signature(function).parameters.keys()


class TestWhoKnowsWhat:
    @EVERY_FILE
    def test_only_the_layout_names_the_branches_of_a_state(self, file: str):
        if file != "rosa_func.weight.layout":
            constants = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.Constant)]
            found = [(node.lineno, node.value) for node in constants if node.value in BRANCHES]
            assert not found

    @EVERY_FILE
    def test_only_one_file_uses_what_torch_keeps_private(self, file: str):
        if file == "rosa_func._torch":
            return
        for name in imports_in(TREES[file]):
            private = [part for part in name.split(".") if part.startswith("_")]
            assert is_in(name, "rosa_func") or not private or name == "__future__", name
            assert name not in {"torch.nn.utils.stateless", "torch.autograd.forward_ad"}
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.ImportFrom) and not is_in(str(node.module), "rosa_func"):
                assert not [a.name for a in node.names if a.name.startswith("_")], node.lineno
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                owner = ast.unparse(node.value)
                # super(): what nn.Module calls by this name can only be overridden under it.
                is_own = owner in {"self", "cls", "super()"} or node.attr in NOT_TORCHS
                assert is_own, f"{file}:{node.lineno} {owner}.{node.attr}"


class TestDocstrings:
    @EVERY_PUBLIC_NAME
    def test_every_public_name_has_an_example_or_says_where_it_is(self, path: str):
        text = PUBLIC[path].__doc__ or ""
        place = path.rpartition(".")[0]
        named = re.findall(r"`([a-z_.]+)`", text)
        others = [PUBLIC.get(f"{place}.{name}" if place else name) for name in named]
        assert ">>>" in text or any(">>>" in (other.__doc__ or "") for other in others if other)

    @EVERY_PUBLIC_NAME
    def test_arguments_are_all_documented_where_some_are(self, path: str):
        text = PUBLIC[path].__doc__ or ""
        _, _, arguments = text.partition("Args:\n")
        for name in inspect.signature(PUBLIC[path]).parameters if arguments else ():
            assert re.search(rf"^ +{name}: ", arguments, re.MULTILINE), name

    @EVERY_PUBLIC_NAME
    def test_every_method_of_a_public_class_has_a_docstring(self, path: str):
        members = vars(PUBLIC[path]).items() if inspect.isclass(PUBLIC[path]) else ()
        for name, member in members:
            if inspect.isfunction(member) and member.__module__.startswith("rosa_func"):
                assert member.__doc__ or name.startswith("_"), name
