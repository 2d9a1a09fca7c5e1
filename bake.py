#!/usr/bin/env python3
"""Start lorabake from a fresh checkout, with nothing installed but Python.

    python bake.py demo               the whole story on the embedded model
    python bake.py test               the whole test suite (further words go to pytest)
    python bake.py train my/photos    every other word is a lorabake command

The first start makes `.venv` beside this file, installs the pinned packages of requirements.txt into it (torch
first), then this project, and hands over. Later starts compare a few lines of text and hand over at once.
Killed in the middle? Start it again: it repairs what was left.

torch is the one large package. A CPU build (about 200 MB) is enough for the demo and the tests. Which build pip
finds first depends on its index; to choose, set pip's own PIP_EXTRA_INDEX_URL, or name the requirement or wheel:

    LORABAKE_TORCH="torch==2.13.0+cpu" python bake.py demo     (remembered as long as .venv is there)
"""

import sys


def unsupported_python(version: "tuple[int, ...]", implementation: str, is_64_bit: bool) -> str:
    """Say what is wrong with this Python and what to do; empty when it will do."""
    if (3, 10) <= version[:2] <= (3, 13) and implementation == "cpython" and is_64_bit:
        return ""
    given = f"{'64' if is_64_bit else '32'}-bit {implementation} {version[0]}.{version[1]}"
    return (
        f"bake.py was started with {given}; lorabake runs on 64-bit CPython 3.10, 3.11, 3.12 or 3.13.\n"
        "Start it with one of those, for example: python3.12 bake.py demo   (Windows: py -3.12 bake.py demo)\n"
        "None of them there? Install one from python.org or with your system's package manager."
    )


# Asked before the rest is even imported: an older Python may not get further. Up to here and in all annotations
# the file keeps to what Python 3.6 can read.
if __name__ == "__main__":
    _refusal = unsupported_python(sys.version_info[:3], sys.implementation.name, sys.maxsize > 2**32)
    if _refusal:
        sys.stderr.write(_refusal + "\n")
        sys.exit(2)

# Only what a second start needs is imported here; what installs is imported where it is used.
import hashlib  # noqa: E402
import os  # noqa: E402

ROOT = os.path.dirname(os.path.realpath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "Scripts", "python.exe") if os.name == "nt" else os.path.join(VENV, "bin", "python")
PYTHON_TAG = f"{sys.version_info[0]}.{sys.version_info[1]}"

# bake.py's own files inside .venv; they outlive a rebuild.
STATE_FILE = os.path.join(VENV, "bake-state.txt")
LOCK_FILE = os.path.join(VENV, "bake-lock")
LOG_FILE = os.path.join(VENV, "bake-pip.log")

# Of the user's environment, all that changes which code runs or where pip installs stays outside.
LEAKING_VARIABLES = {"VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "PIP_PYTHON", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
HARMLESS_VARIABLES = {"PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "PYTHONUTF8"}

# What pip's output tells, and what to do then.
NO_NETWORK = (
    "pip found no way to the package index. Check the network; behind a proxy or mirror, set HTTPS_PROXY or\n"
    "PIP_INDEX_URL. Then start again: what is downloaded is kept."
)
ADVICE = {
    "No space left|not enough space": "The disk is full. Make room (5 GB is plenty), then start again.",
    "SSLError|CERTIFICATE_VERIFY": "A certificate is not trusted. PIP_CERT names the certificate file of your network.",
    "NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|name resolution|getaddrinfo": NO_NETWORK,
    "No matching distribution found for torch": (
        f"pip finds no such torch for this machine and Python {PYTHON_TAG}. Check the network and which index pip uses,\n"
        "or name another torch (a pip requirement or a wheel file) with LORABAKE_TORCH."
    ),
    "from versions: none": NO_NETWORK,
    "": "The same command tries again from here.",
}
WIPE_LINE = "\r" + " " * 79 + "\r"


class Stop(Exception):
    """The environment cannot be made. The message says what happened and what to do."""


def say(text: str) -> None:
    """Tell the user; on stderr, so that the output of `bake.py list --json` stays what lorabake prints."""
    print(text, file=sys.stderr, flush=True)


# ---- what .venv holds, and what it should hold ----


def read_text(name: str) -> str:
    """Text of a file of this checkout."""
    try:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise Stop(f"{name} is not beside bake.py. Take the whole checkout, not this file alone.") from None


def requirements(name: str) -> "list[str]":
    """The lines of a requirement file, without comments."""
    lines = (line.split("#")[0].strip() for line in read_text(name).splitlines())
    return [line for line in lines if line]


def read_state() -> "dict[str, str]":
    """What the last start wrote about `.venv`; empty when nothing is known."""
    try:
        with open(STATE_FILE, encoding="utf-8") as file:
            return dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
    except FileNotFoundError:
        return {}


def write_state(state: "dict[str, str]", status: str) -> None:
    """Replace the state file in one go. ``status`` is "installing" (pip is at work) or "settled"."""
    with open(STATE_FILE + ".new", "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in {**state, "status": status}.items())
        file.flush()
        os.fsync(file.fileno())
    os.replace(STATE_FILE + ".new", STATE_FILE)


def chosen_torch(state: "dict[str, str]") -> str:
    """LORABAKE_TORCH of this start or of an earlier one (a wheel's path made absolute); empty for the pinned torch."""
    choice = os.environ.get("LORABAKE_TORCH", "").strip() or state.get("chosen-torch", "")
    return os.path.abspath(choice) if os.path.isfile(choice) else choice


def goal(state: "dict[str, str]", for_tests: bool) -> "dict[str, str]":
    """One line per step, in order. A step is due when its line in the state is not the same."""

    def digest(*texts: str) -> str:
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    runtime = requirements("requirements.txt")
    torch = chosen_torch(state) or next(line for line in runtime if line.startswith("torch=="))
    lines = {"python": PYTHON_TAG, "torch": torch, "packages": digest(torch, *runtime)}
    if for_tests:
        lines["test-packages"] = digest(torch, *runtime, *requirements("requirements-dev.txt"))
    lines["project"] = digest(ROOT, read_text("pyproject.toml"))  # an editable install points at ROOT
    return lines


def due_steps(state: "dict[str, str]", for_tests: bool) -> "list[str]":
    """Names of the steps to do; none on a second start."""
    lines = goal(state, for_tests)
    if needs_rebuild(state):
        return list(lines)
    return [step for step, line in lines.items() if state.get(step) != line]


def needs_rebuild(state: "dict[str, str]") -> bool:
    """Whether `.venv` must be made anew: absent, of another Python, or left by an installation that was killed."""
    return state.get("status") != "settled" or state.get("python") != PYTHON_TAG or not os.path.exists(PYTHON)


# ---- making it so ----


class Lock:
    """Held while `.venv` changes. The system frees it when its holders end, in whatever way, so it is never stale.

    pip inherits it (not on Windows): when bake.py alone is killed, the next start waits for the pip it left behind.
    """

    def __enter__(self) -> "Lock":
        import time

        try:
            os.makedirs(VENV, exist_ok=True)
            self.file = open(LOCK_FILE, "a+")
        except OSError as error:
            raise Stop(f"Cannot write into {VENV}: {error.strerror}. Move the checkout to a folder of yours.") from None
        if not self._take():
            say("Another bake.py is installing into .venv. Waiting for it to end (Ctrl-C gives up).")
            while not self._take():
                time.sleep(0.1)
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def _take(self) -> bool:
        if sys.platform == "win32":
            import msvcrt

            self.file.seek(0)
            try:
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                return False
        else:
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a network disk without locks: better to go on than to refuse
        return True


def prepare(for_tests: bool) -> None:
    """Bring `.venv` to its goal from whatever state it is in. Raises Stop."""
    foreign = os.path.exists(os.path.join(VENV, "pyvenv.cfg")) and not os.path.exists(LOCK_FILE)
    with Lock() as lock:
        if foreign and not read_state():
            write_state(adopt(), "settled")
        state = read_state()
        steps = due_steps(state, for_tests)  # again: another start may have done them while this one waited
        if steps:
            install(steps, state, goal(state, for_tests), lock)


def install(steps: "list[str]", state: "dict[str, str]", lines: "dict[str, str]", lock: Lock) -> None:
    """Do the due steps in order; after each the state says so, so that a failed one is the only one repeated."""
    import time

    start = time.monotonic()
    chosen = chosen_torch(state)
    if "python" in steps:
        check_may_rebuild(state)
        state = {"made-by": "bake.py"}
    state["chosen-torch"] = chosen
    for number, step in enumerate(steps, 1):
        say(f"step {number} of {len(steps)}: {describe(step, lines)}")
        state.pop(step, None)
        write_state(state, "installing")
        try:
            STEPS[step](lines, lock)
        except Stop:
            write_state(state, "settled")  # pip ended by itself and left the environment whole
            raise
        write_state({**state, step: lines[step]}, "settled" if step == steps[-1] else "installing")
        state[step] = lines[step]
    say(f"Ready after {time.monotonic() - start:.0f} s.\n")


def describe(step: str, lines: "dict[str, str]") -> str:
    """What a step does and how much it downloads at most, for the progress line."""
    torch = os.path.basename(lines["torch"]).replace("==", " ")
    return {
        "python": f"an environment for Python {PYTHON_TAG} in .venv",
        "torch": f"{torch}, about 200 MB (a CUDA build: up to 3 GB)",
        "packages": "the packages lorabake runs on, about 50 MB",
        "test-packages": "the packages its tests need, about 180 MB",
        "project": "lorabake itself",
    }[step]


def adopt() -> "dict[str, str]":
    """State of an environment somebody else made in `.venv`: it is used when it fits, and never removed."""
    import subprocess

    ask = [PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        tag = subprocess.run(ask, capture_output=True, text=True, env=clean_environment()).stdout.strip()
    except OSError:
        tag = ""
    state = {"made-by": "somebody else", "python": tag}
    if tag != PYTHON_TAG:
        check_may_rebuild(state)
    say("Using the .venv that is already here.")
    return state


def check_may_rebuild(state: "dict[str, str]") -> None:
    """Refuse to remove an environment that is not ours or that this process runs from. Raises Stop."""
    if state.get("made-by") == "somebody else":
        is_other = state.get("python") != PYTHON_TAG
        reason = f"is not one of Python {PYTHON_TAG}" if is_other else "holds half an installation"
        raise Stop(f"{VENV} was not made by bake.py and {reason}. Remove it or move it away, then start again.")
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        raise Stop(
            "bake.py must make .venv anew and was started from it. Leave it with `deactivate`, then start again."
        )
    if state:
        other = state.get("python", PYTHON_TAG) != PYTHON_TAG
        say("Making .venv anew: " + ("it was for another Python." if other else "an installation was interrupted."))


def make_environment(lines: "dict[str, str]", lock: Lock) -> None:
    """An empty environment with pip; what a killed installation left is removed first."""
    import importlib.util
    import shutil

    if not importlib.util.find_spec("ensurepip") or not importlib.util.find_spec("venv"):
        raise Stop(
            f"This Python ({sys.executable}) comes without venv and pip, as on Debian and Ubuntu.\n"
            f"Install them (sudo apt install python{PYTHON_TAG}-venv), then start again."
        )
    try:
        for entry in os.scandir(VENV):
            if entry.path in (STATE_FILE, LOCK_FILE, LOG_FILE):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except OSError as error:
        raise Stop(
            f"Cannot remove {error.filename}: {error.strerror}. Is something still running from .venv?"
        ) from None
    run([sys.executable, "-m", "venv", VENV], lock)


def install_torch(lines: "dict[str, str]", lock: Lock) -> None:
    """torch alone and first; what it brings along is held to our pins."""
    pip_install([lines["torch"], "--constraint", packages_file()], lock)


def install_packages(lines: "dict[str, str]", lock: Lock) -> None:
    """All other packages, under a constraint with the very torch that is installed, so that none can replace it."""
    pip_install(["--requirement", packages_file(), "--constraint", torch_file()], lock)


def install_test_packages(lines: "dict[str, str]", lock: Lock) -> None:
    """What only the tests need."""
    development = os.path.join(ROOT, "requirements-dev.txt")
    pip_install(["--requirement", development, "--constraint", packages_file(), "--constraint", torch_file()], lock)


def install_project(lines: "dict[str, str]", lock: Lock) -> None:
    """The `lorabake` package, editable: it runs from src/. Built with the pinned setuptools, nothing is downloaded.

    Compiled as pip compiles what it copies: else the first start would do it, and every start where Python may not write byte code.
    """
    pip_install(["--no-deps", "--no-build-isolation", "--editable", ROOT], lock)
    run([PYTHON, "-m", "compileall", "-q", os.path.join(ROOT, "src")], lock)


def packages_file() -> str:
    """Write requirements.txt without its torch, which the user may have chosen otherwise; the file's path."""
    path = os.path.join(VENV, "bake-packages.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in requirements("requirements.txt") if not line.startswith("torch=="))
    return path


def torch_file() -> str:
    """Write a constraint with the installed torch, its local version (+cpu) included; the file's path."""
    import subprocess

    ask = [PYTHON, "-c", "from importlib.metadata import version; print(version('torch'))"]
    version = subprocess.run(ask, capture_output=True, text=True, env=clean_environment()).stdout.strip()
    path = os.path.join(VENV, "bake-torch.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"torch=={version}\n")
    return path


STEPS = {
    "python": make_environment,
    "torch": install_torch,
    "packages": install_packages,
    "test-packages": install_test_packages,
    "project": install_project,
}


# ---- running other programs ----


def clean_environment() -> "dict[str, str]":
    """The user's environment variables without those that would leak other code into ours."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LEAKING_VARIABLES and (not name.startswith("PYTHON") or name in HARMLESS_VARIABLES)
    }
    return {**kept, "PIP_USER": "0"}  # `user = true` in somebody's pip.conf would refuse to work in an environment


def pip_install(arguments: "list[str]", lock: Lock) -> None:
    """`pip install` in the environment. Mirrors, proxies and wheel folders come from the user's pip settings."""
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    run([PYTHON, "-m", "pip", "install", *options, *arguments], lock)


def run(command: "list[str]", lock: Lock) -> None:
    """Run to the end, output into the log, a sign of life on the terminal. Raises Stop with the last lines of output."""
    import subprocess
    import threading
    import time

    process = subprocess.Popen(
        command,
        cwd=VENV,  # not the user's folder: a random.py lying there would be imported
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=() if os.name == "nt" else (lock.file.fileno(),),
    )
    output: list[str] = []

    def collect() -> None:
        with open(LOG_FILE, "a", encoding="utf-8") as log:
            for line in process.stdout or ():
                output.append(line.rstrip())
                log.write(line)
                log.flush()

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    start = time.monotonic()
    try:
        while reader.is_alive():
            reader.join(1.0)
            show_life(round(time.monotonic() - start), output[-1].strip() if output else "")
        code = process.wait()
    except BaseException:  # Ctrl-C first of all: nothing may go on working in .venv behind the user's back
        process.terminate()
        process.wait()
        raise
    if code:
        raise Stop(failure(command, code, output))
    say(f"{WIPE_LINE if sys.stderr.isatty() else ''}  done in {time.monotonic() - start:.0f} s")


def show_life(seconds: int, line: str) -> None:
    """On a terminal one line, rewritten every second; elsewhere a new one every 30 s."""
    text = f"  {seconds} s  {line}"[:79]
    if sys.stderr.isatty():
        sys.stderr.write(WIPE_LINE + text)
        sys.stderr.flush()
    elif seconds and seconds % 30 == 0:
        say(text)


def failure(command: "list[str]", code: int, output: "list[str]") -> str:
    """What happened, the last lines of what was said, what to do."""
    text = "\n".join(output)
    advice = next(words for signs, words in ADVICE.items() if any(sign in text for sign in signs.split("|")))
    what = " ".join([os.path.basename(command[0]), *command[1:4]])
    news = [line for line in output if not line.startswith(("Requirement already satisfied", "Ignoring "))]
    last = "\n".join("  | " + line for line in news[-12:])
    return f"`{what} ...` ended with exit code {code}. Its last lines (all of them: {LOG_FILE}):\n{last}\n{advice}"


def hand_over(command: "list[str]", folder: str) -> int:
    """Become ``command``; where that cannot be done (Windows), wait for it and return its exit code."""
    os.chdir(folder)
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(command[0], command, clean_environment())
    import signal
    import subprocess

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child too, and is the child's to answer
    return subprocess.call(command, env=clean_environment())


def main(words: "list[str]") -> int:
    """Prepare the environment if need be, then run ``words`` in it; returns the exit code."""
    for_tests = words[:1] == ["test"]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if due_steps(read_state(), for_tests):
            prepare(for_tests)
    except Stop as stop:
        say(f"\n{stop}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped. The same command starts over; what pip has downloaded is kept.")
        return 130
    if for_tests:
        # Every test keeps to one core; -n 0 among the words undoes it. Files are begun in the order of tests/conftest.py.
        spread = ["-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder"]
        return hand_over([PYTHON, "-m", "pytest", *spread, *words[1:]], ROOT)
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # a random.py in the user's folder is not imported
    return hand_over([PYTHON, *safe_path, "-m", "lorabake", *words], os.getcwd())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
