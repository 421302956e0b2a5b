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
MEMORY = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
THREADS = ("-fsanitize=thread",)
# Of the driver: this machine has not the instruction set.
LACKING = 77
# What the thread sanitizer says, before it does anything, where the system's addresses are too
# random for it.
UNSUITED = "unexpected memory mapping"


def compile_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("CC", "cc")), "-o", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Compiles the driver with sanitizers and other options, once for each."""
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("kernels are for Linux on x86-64")
    made: dict[tuple[str, ...], Path] = {}

    def check(sanitizers: tuple[str, ...]) -> None:
        folder = tmp_path_factory.mktemp("sanitizers")
        source = folder / "nothing.c"
        source.write_text("int main(void) { return 0; }\n")
        try:
            done = compile_program(folder / "nothing", *sanitizers, str(source))
        except FileNotFoundError as error:
            pytest.skip(f"there is no C compiler: {error}")
        if done.returncode:
            pytest.skip(f"the compiler has no {sanitizers[0]}: {done.stderr}")

    def driver(sanitizers: tuple[str, ...], options: tuple[str, ...]) -> Path:
        if (*sanitizers, *options) not in made:
            check(sanitizers)
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
            made[*sanitizers, *options] = program
        return made[*sanitizers, *options]

    return driver


def run(program: Path, *arguments: str) -> None:
    """Run the driver; skips where it cannot, and fails where it finds a fault."""
    # Leaks cannot be looked for where the process is traced, and the driver ends with its memory.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=900, env=environment
    )
    if ran.returncode == LACKING:
        pytest.skip(f"this machine has no {arguments[0]}")
    if UNSUITED in ran.stderr:
        pytest.skip(f"the thread sanitizer does not run here: {ran.stderr}")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " 0 failed" in ran.stdout


@pytest.mark.parametrize(
    ("instruction_set", "options"),
    [("amx", ()), ("amx", TILES), ("avx512_vnni", TILES), ("avx512_bf16", TILES)],
    ids=["amx", "amx emulated", "avx512_vnni", "avx512_bf16"],
)
def test_kernels_are_exact_and_stay_within_their_memory(drivers, instruction_set, options):
    if not options and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AMX")
    run(drivers(MEMORY, options), instruction_set)


@pytest.mark.parametrize("instruction_set", ["amx", "avx512_vnni"])
def test_threads_that_run_a_pack_together_wait_for_each_other(drivers, instruction_set):
    run(drivers(THREADS, TILES), instruction_set, "packs")
