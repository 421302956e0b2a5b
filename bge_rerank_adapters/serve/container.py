"""Reads what a container is given: Kubernetes' environment variables, and a CPU quota."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

# A pod has these variables for each Service in its namespace, after the Service's name. See
# "Environment variables" in Kubernetes' documentation of Services, and Docker's links.
_OF_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)")
_OF_PORT = re.compile(r"_PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
_SUFFIX = re.compile(r"_(PROTO|PORT|ADDR)$")


def is_injected(name: str, value: str) -> bool:
    """Return whether a variable is one that Kubernetes sets for a Service.

    For a Service called `bge-rerank` it sets `BGE_RERANK_SERVICE_HOST` and `BGE_RERANK_PORT`, which
    must not count as unknown settings.
    """
    # The Service may also be called bge-rerank-gpu.
    service, port = _ends_with(_OF_SERVICE, name), _ends_with(_OF_PORT, name)
    if service:
        return True
    if not port:
        return False
    # BGE_RERANK_PORT=8000 is a user's mistake for --port.
    return bool(_ADDRESS.fullmatch(value)) or (port != "_PORT" and bool(_SUFFIX.search(name)))


def _ends_with(pattern: re.Pattern[str], name: str) -> str:
    return next((found.group() for found in pattern.finditer(name) if found.end() == len(name)), "")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process's control groups, in CPUs; `None` is no quota.

    A process with a quota still sees all CPUs. If it starts a thread for each, it is throttled most
    of the time. Versions 1 and 2 of control groups are supported.

    Args:
        root: The folder with `proc` and the mounts.
    """
    quotas = [quota for folder in _groups(root) for quota in (_read_quota(folder),) if quota]
    return min(quotas, default=None)


def whole_cpus(quota: float) -> int:
    """Return the number of threads for a quota; a fraction of a CPU counts as one."""
    return max(1, math.ceil(quota))


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups that limit CPU time."""
    own = dict(_own_groups(_lines(root / "proc/self/cgroup")))
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        unified = kind[0] == "cgroup2"
        if not unified and not (kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            continue
        group = own.get("" if unified else "cpu")
        if group is not None:
            yield from _with_parents(root / fields[4].lstrip("/"), _within(fields[3], group))


def _own_groups(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for each in controllers.split(","):
            yield each, path


def _within(mounted: str, group: str) -> str:
    """Return a group's path below the mounted one, which in a container is often the same."""
    if mounted == "/":
        return group
    return group.removeprefix(mounted) if group.startswith(mounted) else "/"


def _with_parents(mount: Path, group: str) -> Iterator[Path]:
    folder = mount / group.strip("/")
    yield folder
    yield from (each for each in folder.parents if each == mount or mount in each.parents)


def _read_quota(folder: Path) -> float | None:
    [line] = _lines(folder / "cpu.max") or [""]
    if line:
        quota, _, period = line.partition(" ")
    else:
        [quota] = _lines(folder / "cpu.cfs_quota_us") or [""]
        [period] = _lines(folder / "cpu.cfs_period_us") or [""]
    # No limit is "max" in version 2 and -1 in version 1.
    known = quota.isdigit() and period.isdigit() and int(period) > 0
    return int(quota) / int(period) if known else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
