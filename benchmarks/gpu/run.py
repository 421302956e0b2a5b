"""The stages, each in a process of its own with a time of its own."""

import argparse
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.results import Report, Row, Rows
from benchmarks.gpu.setting import PASSAGE_TOKENS, Setting

_ROOT = Path(__file__).parent.parent.parent
# Before the lines that are rows, since libraries write to the standard output as well.
_MARK = "row "


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a run.

    Attributes:
        seconds: Most that it may take; what it has found by then is kept.
        module: Of this package; loaded by the stage's own process, since it brings torch.
        function: Yields the stage's rows.
        options: Its further arguments.
    """

    seconds: float
    module: str
    function: str
    options: dict[str, str] = field(default_factory=dict)

    def rows(self, setting: Setting) -> Rows:
        """Return what it finds, as it finds it."""
        module = import_module(f"benchmarks.gpu.{self.module}")
        found: Rows = getattr(module, self.function)(setting, **self.options)
        return found


# In their order: what is right comes first, then what is asked for most.
STAGES = {
    "device": Stage(45, "figures", "device_facts"),
    "correctness": Stage(90, "correctness", "correctness"),
    "v2-m3": Stage(110, "figures", "throughput", {"shape": "v2-m3"}),
    "base": Stage(70, "figures", "throughput", {"shape": "base"}),
    "robustness": Stage(60, "robustness", "robustness"),
    "growth": Stage(45, "figures", "growth"),
    "large": Stage(90, "figures", "throughput", {"shape": "large"}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns 1 if a check failed or a stage did not end well."""
    options = _parse(arguments)
    if options.only:
        setting = _setting(options, options.folder)
        _run_here(STAGES[options.only].rows(setting))
        return 0
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        report = Report(options.output, _about(options))
        _run_all(options, folder, report)
    sys.stdout.write((options.output / "gpu.md").read_text(encoding="utf-8"))
    return int(bool(report.failures))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("full", "small"), default="full")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="for the results")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints in a folder")
    parser.add_argument("--limit-s", type=float, default=460.0, help="for the whole run")
    parser.add_argument("--stage-limit-s", type=float, help="for each stage, instead of its own")
    parser.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS)
    parser.add_argument("--only", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    return Setting(options.device, options.shape == "small", folder, options.passage_tokens)


def _about(options: argparse.Namespace) -> dict[str, object]:
    return {
        "device": options.device,
        "shape": options.shape,
        "passages": f"{options.passage_tokens} tokens on average, lengths spread evenly about it",
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _run_here(rows: Rows) -> None:
    for row in rows:
        sys.stdout.write(_MARK + row.to_json() + "\n")
        sys.stdout.flush()


def _run_all(options: argparse.Namespace, folder: Path, report: Report) -> None:
    begin = time.monotonic()
    for name in options.stages:
        seconds = options.stage_limit_s or STAGES[name].seconds
        left = options.limit_s - (time.monotonic() - begin)
        if left <= 0:
            report.end(name, "not begun: the run's time was over")
            continue
        _watch(name, _command(options, name, folder), report, seconds=min(seconds, left))


def _command(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.gpu", "--only", name, "--device", options.device),
        *("--shape", options.shape, "--folder", str(folder)),
        *("--passage-tokens", str(options.passage_tokens)),
    ]


def _watch(name: str, command: list[str], report: Report, *, seconds: float) -> None:
    """Run a stage's process and write its rows as they come; end it when its time is over."""
    begin = time.monotonic()
    errors = report.folder / f"{name}.log"
    with errors.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - this module itself
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while (
                line := lines.get(timeout=max(0.0, begin + seconds - time.monotonic()))
            ) is not None:
                if line.startswith(_MARK):
                    report.add(name, Row.from_json(line.removeprefix(_MARK)))
            code = process.wait()
            how = f"after {time.monotonic() - begin:.0f} s"
        except queue.Empty:
            process.kill()
            code, how = process.wait(), f"cut off after its {seconds:.0f} s"
    last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    report.end(name, how if code == 0 else f"with code {code}, {how}; {' '.join(last)[:300]}")


def _until(lines: "queue.Queue[str | None]", end: float) -> Iterator[str]:
    """Yield lines until the last one.

    Raises:
        queue.Empty: The last one had not come by the end, by the monotonic clock.
    """
    while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
        yield line


def _read(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    if process.stdout is not None:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
