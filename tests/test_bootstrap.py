"""bake.py for real: it makes environments with pip in a temporary checkout, out of tiny wheels made here. No network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BAKE = Path(__file__).resolve().parent.parent / "bake.py"
VENV_PYTHON = Path(".venv", "Scripts", "python.exe") if os.name == "nt" else Path(".venv", "bin", "python")

# What the stand-in for lorabake does: tell how it was started, and end as it is told.
PRODUCT = """
import importlib.metadata, json, os, sys
report = {
    "words": sys.argv[1:], "folder": os.getcwd(), "python": sys.prefix, "pythonpath": os.environ.get("PYTHONPATH"),
    "toy": importlib.metadata.version("toy"), "torch": importlib.metadata.version("torch"),
}
import toy.part
print(json.dumps(report))
sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else 0)
"""

# A build backend of the checkout itself, so that no wheel of setuptools is needed. SLOW_BUILD gives time to be killed.
BACKEND = """
import os, pathlib, time, zipfile
INFO = "lorabake-0.1.0.dist-info"
def build_editable(folder, config_settings=None, metadata_directory=None):
    time.sleep(float(os.environ.get("SLOW_BUILD", "0")))
    name = "lorabake-0.1.0-0.editable-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("lorabake.pth", str(pathlib.Path("src").absolute()))
        wheel.writestr(INFO + "/METADATA", "Metadata-Version: 2.1\\nName: lorabake\\nVersion: 0.1.0\\n")
        wheel.writestr(INFO + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(INFO + "/RECORD", "")
    return name
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A pure Python wheel with ``files`` (path in site-packages -> text)."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Checkout:
    """A small checkout around the real bake.py."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root, self.wheels = root, wheels

    def write(self) -> Checkout:
        """Put the files of a fresh checkout there."""
        (self.root / "src" / "lorabake").mkdir(parents=True)
        (self.root / "src" / "lorabake" / "__init__.py").touch()
        (self.root / "src" / "lorabake" / "__main__.py").write_text(PRODUCT)
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (self.root / "requirements.txt").write_text("# pinned\ntorch==2.13.0\n\ntoy==1.0  # a comment\n")
        (self.root / "requirements-dev.txt").write_text("pytest==99\n")
        shutil.copy(BAKE, self.root)
        return self

    def copy(self, to: Path) -> Checkout:
        """The same checkout, environment and all, somewhere else."""
        shutil.copytree(self.root, to, symlinks=True)
        return Checkout(to, self.wheels)

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a start that sees our wheels only, and a PYTHONPATH that must not get through."""
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return {**os.environ, **pip, "PYTHONPATH": str(self.root / "elsewhere"), **more}

    def command(self, *words: str) -> list[str]:
        """The command line of a start."""
        return [sys.executable, str(self.root / "bake.py"), *words]

    def start(self, *words: str, folder: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Start bake.py and wait for its end."""
        return subprocess.run(
            self.command(*words), cwd=folder, env=self.environment(**more), capture_output=True, text=True, timeout=300
        )

    def launch(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start bake.py and let it run."""
        pipe = subprocess.PIPE
        listens = _listen_to_ctrl_c if os.name == "posix" else None
        return subprocess.Popen(
            self.command(*words),
            env=self.environment(**more),
            stdout=pipe,
            stderr=pipe,
            text=True,
            preexec_fn=listens,
        )

    def state(self) -> dict[str, str]:
        """What the environment says about itself."""
        path = self.root / ".venv" / "bake-state.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split("=", 1) for line in lines)

    def package(self, name: str) -> Path:
        """Where an installed package lies."""
        return next(path for path in (self.root / ".venv").glob("**/site-packages") if path.is_dir()) / name


def _listen_to_ctrl_c() -> None:
    """A test run that was started in the background ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that pip can find."""
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "torch", "2.13.0", {"torch/__init__.py": ""})
    for version in ("1.0", "1.1"):
        write_wheel(folder, "toy", version, {"toy/__init__.py": "", "toy/part.py": f"VERSION = '{version}'\n"})
    write_wheel(folder, "pytest", "99", {"pytest/__main__.py": PRODUCT, "pytest/__init__.py": ""})
    return folder


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Iterator[tuple[Checkout, str]]:
    """A checkout after its first start, and what that start said."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout") / "with space", wheels).write()
    first = checkout.start("demo", "--json", "7")
    assert first.returncode == 7, first.stderr
    assert json.loads(first.stdout)["words"] == ["demo", "--json", "7"]
    yield checkout, first.stderr


@pytest.fixture
def checkout(baked: tuple[Checkout, str], tmp_path: Path) -> Checkout:
    """A baked checkout that a test may change. It has moved, so that bake.py must notice that, too."""
    return baked[0].copy(tmp_path / "moved")


def load_bake() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bake", BAKE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_first_start_shows_its_steps(baked: tuple[Checkout, str]) -> None:
    _, said = baked
    for part in ("step 1 of 4", "step 2 of 4: torch 2.13.0", "step 3 of 4", "step 4 of 4: lorabake", "Ready after"):
        assert part in said


def test_no_start_compiles_the_project(baked: tuple[Checkout, str]) -> None:
    """Also where Python may not write byte code: it is there from the installation on."""
    compiled = baked[0].root / "src" / "lorabake" / "__pycache__"
    assert {path.name.split(".")[0] for path in compiled.glob("*.pyc")} == {"__init__", "__main__"}


def test_second_start_only_hands_over(baked: tuple[Checkout, str], tmp_path: Path) -> None:
    checkout, _ = baked
    before = checkout.state()
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the folder of the user')")
    again = checkout.start("train", "Ä b", "", folder=tmp_path if sys.version_info >= (3, 11) else None)
    assert again.returncode == 0 and again.stderr == ""
    report = json.loads(again.stdout)
    assert report["words"] == ["train", "Ä b", ""] and report["pythonpath"] is None
    assert Path(report["python"]) == (checkout.root / ".venv").resolve()
    assert (report["toy"], report["torch"]) == ("1.0", "2.13.0")
    assert checkout.state() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows waits for a child and needs subprocess for it")
def test_second_start_imports_nothing_slow(baked: tuple[Checkout, str]) -> None:
    checkout, _ = baked
    watch = (
        "import os, sys\n"
        "def execve(path, words, environment):\n"
        "    print(*sorted({'subprocess', 'threading', 'shutil', 'json', 're', 'tempfile', 'typing'} & set(sys.modules)))\n"
        "    sys.exit(0)\n"
        "os.execve, sys.argv = execve, ['bake.py', 'demo']\n"
        f"__file__ = {str(checkout.root / 'bake.py')!r}\n"
        "exec(compile(open(__file__).read(), __file__, 'exec'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-I", "-c", watch],
        env=checkout.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "", "imported before the hand-over of a second start"


def test_test_runs_pytest_in_the_checkout(checkout: Checkout, tmp_path: Path) -> None:
    result = checkout.start("test", "-k", "x", "5", folder=tmp_path)
    assert result.returncode == 5, result.stderr
    report = json.loads(result.stdout)
    assert (
        report["words"] == ["-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder", "-k", "x", "5"]
        and Path(report["folder"]) == checkout.root.resolve()
    )
    assert "step 2 of 2: lorabake itself" in result.stderr  # the checkout has moved
    assert "step" not in checkout.start("test").stderr and "step" not in checkout.start("demo").stderr


def test_changed_requirement_is_installed(checkout: Checkout) -> None:
    (checkout.root / "requirements.txt").write_text("torch==2.13.0\ntoy==1.1\n")
    result = checkout.start("demo")
    assert json.loads(result.stdout)["toy"] == "1.1", result.stderr
    assert "torch 2.13.0" not in result.stderr  # what has not changed stays


def test_failure_says_what_to_do_and_is_repeated_alone(checkout: Checkout) -> None:
    (checkout.root / "requirements.txt").write_text("torch==2.13.0\ntoy==3.0\n")
    failed = checkout.start("demo")
    assert failed.returncode == 1 and failed.stdout == ""
    assert "No matching distribution found for toy==3.0" in failed.stderr and "tries again" in failed.stderr
    (checkout.root / "requirements.txt").write_text("torch==2.13.0\ntoy==1.1\n")
    mended = checkout.start("demo")
    assert json.loads(mended.stdout)["toy"] == "1.1" and "anew" not in mended.stderr


def test_missing_torch_names_the_override(checkout: Checkout, tmp_path: Path) -> None:
    failed = checkout.start("demo", LORABAKE_TORCH="torch==2.13.0+absent")
    assert failed.returncode == 1 and "LORABAKE_TORCH" in failed.stderr
    write_wheel(tmp_path, "torch", "2.13.0+mine", {"torch/__init__.py": ""})
    wheel = next(tmp_path.glob("torch*.whl"))
    chosen = checkout.start("demo", folder=tmp_path, LORABAKE_TORCH=wheel.name)
    assert json.loads(chosen.stdout)["torch"] == "2.13.0+mine", chosen.stderr
    assert checkout.start("demo").stderr == ""  # remembered


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_killed_installation_is_repaired(checkout: Checkout) -> None:
    (checkout.root / "requirements.txt").write_text("torch==2.13.0\ntoy==1.1\n")
    process = checkout.launch("demo", SLOW_BUILD="3")
    deadline = time.monotonic() + 60
    while "packages" not in checkout.state() or checkout.state()["status"] != "installing" or not is_building(process):
        assert process.poll() is None and time.monotonic() < deadline, "never seen installing"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (checkout.package("toy") / "part.py").unlink()  # as a package looks that pip had half written
    repaired = checkout.start("demo")
    assert repaired.returncode == 0, repaired.stderr
    assert "an installation was interrupted" in repaired.stderr
    assert json.loads(repaired.stdout)["toy"] == "1.1"
    assert checkout.start("demo").stderr == ""


def is_building(process: subprocess.Popen[str]) -> bool:
    """Whether bake.py's pip is at work in the last step (it has said so)."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    said = getattr(process, "said", "") + (process.stderr.read() or "")
    process.said = said  # type: ignore[attr-defined]
    return "lorabake itself" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT for one process")
def test_ctrl_c_while_installing(checkout: Checkout) -> None:
    process = checkout.launch("demo", SLOW_BUILD="60")
    while checkout.state().get("status") != "installing":
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Stopped." in said and "Traceback" not in said


@pytest.mark.slow
def test_two_first_starts_at_once(wheels: Path, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout", wheels).write()
    both = [checkout.launch("demo", code) for code in ("3", "4")]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [3, 4], said
    assert sum("step 1 of 4" in text for text in said) == 1
    assert sum("Another bake.py is installing" in text for text in said) == 1


@pytest.mark.slow
def test_environment_of_somebody_else(wheels: Path, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout", wheels).write()
    subprocess.run([sys.executable, "-m", "venv", checkout.root / ".venv"], check=True)
    theirs = checkout.root / ".venv" / "theirs.txt"
    theirs.touch()
    used = checkout.start("demo")
    assert used.returncode == 0 and "already here" in used.stderr and theirs.exists()
    state = checkout.root / ".venv" / "bake-state.txt"
    state.write_text(state.read_text().replace("status=settled", "status=installing"))
    refused = checkout.start("demo")
    assert refused.returncode == 1 and "not made by bake.py" in refused.stderr and theirs.exists()


def test_help_needs_no_environment(tmp_path: Path, wheels: Path) -> None:
    checkout = Checkout(tmp_path / "checkout", wheels).write()
    for words in ([], ["--help"]):
        result = checkout.start(*words)
        assert result.returncode == 0 and "python bake.py demo" in result.stdout
    assert not (checkout.root / ".venv").exists()


def test_lonely_script_is_explained(tmp_path: Path) -> None:
    shutil.copy(BAKE, tmp_path)
    result = subprocess.run([sys.executable, tmp_path / "bake.py", "demo"], capture_output=True, text=True)
    assert result.returncode == 1 and "requirements.txt is not beside bake.py" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("version", "implementation", "is_64_bit", "given"),
    [
        ((3, 9, 18), "cpython", True, "64-bit cpython 3.9"),
        ((3, 14, 0), "cpython", True, "64-bit cpython 3.14"),
        ((3, 12, 1), "pypy", True, "64-bit pypy 3.12"),
        ((3, 12, 1), "cpython", False, "32-bit cpython 3.12"),
    ],
)
def test_unsupported_python(version: tuple[int, ...], implementation: str, is_64_bit: bool, given: str) -> None:
    message = load_bake().unsupported_python(version, implementation, is_64_bit)
    assert given in message and "3.10, 3.11, 3.12 or 3.13" in message and "python3.12 bake.py demo" in message


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_supported_python(minor: int) -> None:
    assert load_bake().unsupported_python((3, minor, 0), "cpython", True) == ""


def test_old_pythons_can_read_the_script() -> None:
    ast.parse(BAKE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_waiting_hand_over_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    bake = load_bake()
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(bake.os, "name", "nt")
    try:
        assert bake.hand_over([sys.executable, "-c", "raise SystemExit(6)"], os.getcwd()) == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_advice_fits_the_failure() -> None:
    bake = load_bake()
    for output, expected in (
        ("... NewConnectionError('<...>: Failed to establish a new connection: [Errno -3]')", "Check the network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "Make room"),
        ("ERROR: No matching distribution found for torch==2.13.0", "LORABAKE_TORCH"),
        ("ERROR: Could not find a version that satisfies idna==3.19 (from versions: none)", "Check the network"),
        ("something else", "tries again"),
    ):
        assert expected in bake.failure(["python", "-m", "pip", "install", "x"], 1, ["first", output])
