"""The C sources under sanitizers: every kernel over odd sizes, in memory that ends at guard pages.

`kernels/drive.c` is the program; what it is given to compare with is in float64.
"""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

from bge_rerank_adapters.engine.models.cpu.kernels import build
from tests.kernels.emulation import TILES

DRIVER = Path(__file__).parent / "kernels" / "drive.c"
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
# Of the driver: this machine has not the instruction set.
LACKING = 77


def compile_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("CC", "cc")), "-o", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory) -> tuple[str, ...]:
    """The compiler's options for sanitizers; skips where it has none."""
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("kernels are for Linux on x86-64")
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    try:
        done = compile_program(folder / "nothing", *SANITIZERS, str(source))
    except FileNotFoundError as error:
        pytest.skip(f"there is no C compiler: {error}")
    if done.returncode:
        pytest.skip(f"the compiler has no address and undefined sanitizers: {done.stderr}")
    return SANITIZERS


@pytest.fixture(scope="module")
def drivers(sanitizers, tmp_path_factory):
    """Compiles the driver with other options, once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def driver(*options: str) -> Path:
        if options not in made:
            program = tmp_path_factory.mktemp("driver") / "drive"
            # Memory of a thread is the driver's own.
            sources = [
                str(path)
                for path in build.sources()
                if path.suffix == ".c" and path.name != "room.c"
            ]
            done = compile_program(
                program,
                *("-O1", "-g", "-std=gnu11", "-fno-math-errno", "-pthread"),
                *(*sanitizers, *options, "-DBGE_SOURCES=0u", f"-I{build.FOLDER}"),
                *(str(DRIVER), *sources, "-lm"),
            )
            assert done.returncode == 0, done.stderr
            made[options] = program
        return made[options]

    return driver


@pytest.mark.parametrize(
    ("instruction_set", "options"),
    [("amx", ()), ("amx", TILES), ("avx512_vnni", TILES), ("avx512_bf16", TILES)],
    ids=["amx", "amx emulated", "avx512_vnni", "avx512_bf16"],
)
def test_kernels_are_exact_and_stay_within_their_memory(drivers, instruction_set, options):
    if not options and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AMX")
    # Leaks cannot be looked for where the process is traced, and the driver ends with its memory.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [drivers(*options), instruction_set],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    if ran.returncode == LACKING:
        pytest.skip(f"this machine has no {instruction_set}")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " 0 failed" in ran.stdout
