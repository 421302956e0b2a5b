"""Installs each wheel into a fresh environment, where no compiler is found, and tests it there.

The requirements are installed once, into an environment that every wheel's environment reads; the
wheels themselves never meet, nor the checkout.

    python release/check_wheels.py dist/*.whl
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).with_name("test_installed.py")
EXTRAS = "haystack,langchain,llama-index,milvus,remote,serve"


class Environment:
    """A virtual environment and its Python."""

    def __init__(self, folder: Path, *, reads: Path | None = None) -> None:
        """Make it in a folder; with a site-packages that it reads as well, it takes pip from there.

        Of its own it has nothing then, so what is read is not hidden by other versions.
        """
        venv.create(folder, with_pip=reads is None)
        windows = sys.platform == "win32"
        self.scripts = folder / ("Scripts" if windows else "bin")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / ("Lib" if windows else f"lib/{version}") / "site-packages"
        if reads:
            (self.packages / "requirements.pth").write_text(f"{reads}\n")

    def run(self, *arguments: str, folder: Path | None = None, search: str | None = None) -> None:
        """Run its Python, with another PATH where one is given; exits where that fails."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if search is not None:
            environment["PATH"] = search
        command = [self.scripts / "python", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, check=False)  # noqa: S603
        if done.returncode:
            sys.exit(f"This failed: {' '.join(map(str, command))}")

    def install(self, *arguments: str) -> None:
        """Have its pip install something."""
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def install_requirements(folder: Path, wheel: Path, constraints: Path) -> Environment:
    """Return an environment with all that a wheel asks for, and without it."""
    made = Environment(folder)
    pins = constraints.read_text("utf-8").splitlines()
    # Asked for by its number alone: any other request brings the GPU's libraries on Linux.
    made.install(next(pin for pin in pins if pin.startswith("torch==")))
    made.install("--constraint", str(constraints), f"{wheel.resolve()}[{EXTRAS}]", "pytest")
    made.run("-m", "pip", "uninstall", "--quiet", "--yes", "bge-rerank-adapters")
    return made


def check(wheel: Path, folder: Path, requirements: Environment) -> None:
    """Install a wheel into an environment of its own and run the tests; exits where one fails."""
    sys.stdout.write(f"\n{wheel.name}\n")
    sys.stdout.flush()
    own = Environment(folder / "environment", reads=requirements.packages)
    own.install("--no-deps", str(wheel.resolve()))
    own.run("-m", "pip", "check")
    # Away from the checkout, whose package and settings of pytest would be found.
    tests = shutil.copy(TESTS, folder)
    search = str(own.scripts)
    if sys.platform == "win32":
        search += os.pathsep + str(Path(os.environ["SYSTEMROOT"], "System32"))
    own.run("-m", "bge_rerank_adapters", "info", folder=folder, search=search)
    own.run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, folder=folder, search=search)


def main() -> None:
    """Check the wheels that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        requirements = install_requirements(
            Path(made, "requirements"), given.wheels[0], given.constraints
        )
        for number, wheel in enumerate(given.wheels):
            folder = Path(made, str(number))
            folder.mkdir()
            check(wheel, folder, requirements)


if __name__ == "__main__":
    main()
