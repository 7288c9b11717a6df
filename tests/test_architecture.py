"""The rules of the house, checked on the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "spatialt2i"
ROOMS = {"tiny", "data", "reward", "rl", "bench", "report"}
CORE_FILES = {"__init__.py", "types.py", "config.py", "protocols.py", "run.py", "store.py", "device.py"}
DEEP_LEARNING = {"torch", "transformers", "diffusers", "peft", "accelerate", "safetensors"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NOUNS = {  # what is exchanged, and the one file that defines it and how
    "Config": ("config", "frozen"), "RunDir": ("run", "class"),
    "Prompt": ("types", "frozen"), "Pair": ("types", "frozen"), "Preference": ("types", "frozen"),
    "Verdict": ("types", "frozen"), "Rollout": ("types", "dataclass"), "Benchmark": ("types", "frozen"),
    "Generator": ("protocols", "protocol"), "Verifier": ("protocols", "protocol"), "Scorer": ("protocols", "protocol"),
    "Policy": ("protocols", "protocol"),
}

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room(path: Path) -> str:
    """``core``, a room, or the stem of a file beside them."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Absolute names of all imported modules below a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)[: -child.level] if child.level else []
            module = ".".join([*base, child.module] if child.module else base)
            yield module
            yield from (f"{module}.{alias.name}" for alias in child.names)


def runtime_imports(path: Path) -> set[str]:
    """Imported modules, without those under ``if TYPE_CHECKING``."""
    module = tree(path)
    for node in ast.walk(module):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = [ast.Pass()]
    return set(imports(module, path))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def public_functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for child in node.body:
        if isinstance(child, FUNCTIONS) and not child.name.startswith("_"):
            yield child
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child)


@every_file
def test_rooms_import_only_core(path: Path) -> None:
    allowed = {"core": {"core"}, "build": ROOMS | {"core", "build"}, "cli": {"core", "build"}, "__init__": set()}
    allowed |= {name: {"core", name} for name in ROOMS}
    own = room(path)
    assert own in allowed, f"{own} is neither core nor one of the rooms {sorted(ROOMS)}"
    used = {name.split(".")[1] for name in imports(tree(path), path) if name.startswith("spatialt2i.")}
    assert used - {"__version__"} <= allowed[own], f"{path.name} imports {sorted(used - allowed[own])}"


def kind(node: ast.ClassDef) -> str:
    marks = [ast.unparse(d) for d in node.decorator_list]
    if "Protocol" in map(ast.unparse, node.bases):
        return "protocol"
    return "frozen" if "dataclass(frozen=True)" in marks else "dataclass" if "dataclass" in marks else "class"


def test_the_twelve_nouns_are_where_they_belong_and_nowhere_else() -> None:
    found = {(n.name, str(path.relative_to(PACKAGE)), kind(n)) for path in FILES for n in ast.walk(tree(path))
             if isinstance(n, ast.ClassDef) and n.name in NOUNS}
    assert found == {(name, f"core/{file}.py", how) for name, (file, how) in NOUNS.items()}


def test_core_has_no_seventh_file() -> None:
    assert {p.name for p in (PACKAGE / "core").iterdir() if p.name != "__pycache__"} == CORE_FILES


@pytest.mark.parametrize("name", sorted(CORE_FILES - {"device.py"}))
def test_core_knows_no_deep_learning_outside_device(name: str) -> None:
    path = PACKAGE / "core" / name
    assert not {m.split(".")[0] for m in runtime_imports(path)} & DEEP_LEARNING


@every_file
def test_no_print_and_no_debugger(path: Path) -> None:
    assert not [node.lineno for name, node in calls(path) if name in ("print", "breakpoint", "pprint", "pprint.pprint")]


@every_file
def test_every_except_names_what_it_catches(path: Path) -> None:
    assert not [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler) and n.type is None]


@every_file
def test_no_input_is_unpickled(path: Path) -> None:
    assert not {m.split(".")[0] for m in imports(tree(path), path)} & UNSAFE_MODULES
    for name, node in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load without weights_only=True"
        assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}: allow_pickle"
        assert keywords.get("trust_remote_code", "False") == "False", f"line {node.lineno}: trust_remote_code"


@every_file
def test_public_functions_name_their_arguments(path: Path) -> None:
    assert not [f.name for f in public_functions(tree(path)) if f.args.kwarg is not None]


@every_file
def test_public_names_have_docstrings(path: Path) -> None:
    module = tree(path)
    named = [n for n in module.body if isinstance(n, (*FUNCTIONS, ast.ClassDef)) and not n.name.startswith("_")]
    assert not [n.name for n in named if not ast.get_docstring(n)]
    assert not module.body or ast.get_docstring(module), "the file says nowhere what it is for"


@every_file
def test_nothing_happens_on_import(path: Path) -> None:
    bare = [n for n in tree(path).body if isinstance(n, ast.Expr) and not isinstance(n.value, ast.Constant)]
    assert not [n.lineno for n in bare]


@every_file
def test_no_hidden_environment_variables(path: Path) -> None:
    found = {ast.unparse(n) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)} | {n for n, _ in calls(path)}
    named = {"os.environ"} if path.name == "endpoint.py" else set()  # a key, from the variable that the preset names
    assert found & {"os.environ", "os.getenv", "os.putenv"} == named


@every_file
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    assert not [f.name for f in ast.walk(tree(path)) if isinstance(f, FUNCTIONS) and f.end_lineno - f.lineno >= 90]


@every_file
def test_lines_are_at_most_120_characters(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


def test_importing_the_command_line_is_light() -> None:
    heavy = DEEP_LEARNING | {"datasets", "matplotlib", "scipy", "tensorboard"}
    code = ("import sys, spatialt2i.cli, spatialt2i.core.types, spatialt2i.core.store, spatialt2i.core.device; "
            f"sys.exit(repr(sorted({heavy!r} & set(sys.modules))) if {heavy!r} & set(sys.modules) else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60)
    assert done.returncode == 0, done.stderr
