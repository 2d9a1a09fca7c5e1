"""The shape of the house: sizes, names, docstrings, what may be called where, and what importing may cost."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "lorabake"
MODULES = sorted(SOURCE.rglob("*.py"))

MODULE_LINES = 450
FUNCTION_LINES = 80
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
HEAVY = {"torch", "diffusers", "transformers", "peft"}
TEST_ONLY = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "tensorboard",
    "skimage",
    "scipy",
    "hypothesis",
    "pytest",
}
THINKING_ROOMS = {"base", "dataset", "protocols", "recipe", "plan", "cli", "studio", "api", "__init__", "__main__"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree(path: Path) -> ast.Module:
    """A module, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """Where something is, as an editor understands it."""
    line = f":{getattr(node, 'lineno', 1)}" if node else ""
    return f"{path.relative_to(ROOT)}{line}"


def module_name(path: Path) -> str:
    """Dotted name: .../src/lorabake/base/cards.py -> lorabake.base.cards."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(path: Path) -> str:
    """The room a module is in; for a file of the package itself, its name."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def named(path: Path) -> Iterator[tuple[Function | ast.ClassDef, str]]:
    """Functions and classes at the top of a module, with their names."""
    for node in tree(path).body:
        if isinstance(node, Function | ast.ClassDef):
            yield node, node.name


def expect_none(offenders: list[str], rule: str) -> None:
    """Fail with everything that breaks ``rule``, not with the first."""
    if offenders:
        pytest.fail(f"{rule}\n  " + "\n  ".join(offenders), pytrace=False)


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    offenders = [f"{place(path)} has {length} lines" for path, length in lengths.items() if length > MODULE_LINES]
    expect_none(
        offenders, f"A module has at most {MODULE_LINES} lines. Cut it where its parts have names of their own."
    )


def test_functions_are_short() -> None:
    offenders = [
        f"{place(path, node)} {node.name} has {length} lines"
        for path in [*MODULES, ROOT / "bake.py", ROOT / "scripts" / "check"]
        for node in ast.walk(tree(path))
        if isinstance(node, Function) and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]
    expect_none(offenders, f"A function has at most {FUNCTION_LINES} lines. Name its steps.")


def test_names_say_something() -> None:
    offenders = [
        place(path) for path in SOURCE.rglob("*") if EMPTY_WORDS & set(path.stem.lower().strip("_").split("_"))
    ] + [
        f"{place(path, node)} {name}"
        for path in MODULES
        for node, name in named(path)
        if isinstance(node, ast.ClassDef) and name.lower().endswith(("manager", "helper", "utils"))
    ]
    expect_none(offenders, f"No {', '.join(sorted(EMPTY_WORDS))}: name what the thing does.")


def test_public_things_have_docstrings() -> None:
    offenders = [
        f"{place(path)} (the module)" for path in MODULES if tree(path).body and not ast.get_docstring(tree(path))
    ]
    offenders += [
        f"{place(path, node)} {name}"
        for path in MODULES
        for node, name in named(path)
        if not name.startswith("_") and not ast.get_docstring(node) and not is_overload(node)
    ]
    expect_none(offenders, "Every module and every public function and class has a docstring: units, shapes, errors.")


def is_overload(node: ast.AST) -> bool:
    """Whether a function is one of the signatures of an overloaded one."""
    return any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in getattr(node, "decorator_list", ()))


def forbidden(path: Path, node: ast.AST) -> str:
    """What is wrong with a call or an import, if anything."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        roots = {name.partition(".")[0] for name in modules}
        if roots & {"pickle", "cPickle", "dill", "marshal", "shelve"}:
            return "a pickle can run code: use safetensors or JSON"
        if roots & TEST_ONLY:
            return f"{', '.join(roots & TEST_ONLY)} is for tests only, users do not have it"
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    if called == "print" and room(path) != "cli":
        return "print() belongs to cli: emit an event, or return the text"
    if called in ("torch.load", "torch.save"):
        return f"{called} pickles: use safetensors"
    if called in ("eval", "exec", "os.system", "breakpoint"):
        return f"{called}() has no place in the package"
    if any(word.arg == "shell" and getattr(word.value, "value", None) is True for word in node.keywords):
        return "shell=True: pass the words as a list"
    return ""


def test_nothing_forbidden_is_called() -> None:
    found = ((path, node, forbidden(path, node)) for path in MODULES for node in ast.walk(tree(path)))
    expect_none([f"{place(path, node)} {why}" for path, node, why in found if why], "Not in this house:")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(1)", "cli"),
        ("import pickle", "safetensors"),
        ("from pickle import loads", "safetensors"),
        ("torch.load(p)", "safetensors"),
        ("subprocess.run(x, shell=True)", "list"),
        ("eval(x)", "no place"),
        ("from diffusers.models import UNet", "tests only"),
        ("model.eval()", ""),
        ("subprocess.run(x, shell=False)", ""),
    ],
)
def test_forbidden_things_are_seen(code: str, expected: str) -> None:
    why = [forbidden(SOURCE / "train" / "x.py", node) for node in ast.walk(ast.parse(code))]
    assert [word for word in why if word] == [] if not expected else expected in " ".join(why)


def run_python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)


def test_importing_lorabake_takes_no_torch() -> None:
    code = f"import sys, lorabake; print(*sorted({HEAVY | {'numpy', 'PIL'}!r} & set(sys.modules)))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "", "`import lorabake` loads these: import them where they are used"


def test_rooms_that_think_import_nothing_heavy() -> None:
    names = [module_name(path) for path in MODULES if room(path) in THINKING_ROOMS or path.stem == "card"]
    names = [name for name in names if not name.endswith("__main__")]  # importing it starts the command line
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    if found := {HEAVY!r} & set(sys.modules):\n"
        "        sys.exit(f'importing {name} loads {sorted(found)}: import it where it is used, or base.lazy')\n"
    )
    result = run_python(code, *names)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["format", "lint", "layers", "types"])
def test_scripts_check(name: str) -> None:
    command = [sys.executable, ROOT / "scripts" / "check", "--only", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(result.stdout + result.stderr, pytrace=False)
