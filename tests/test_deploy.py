"""The files in deploy/ against the server, and what a container's surroundings tell it."""

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("fastapi")

from bge_rerank_adapters import SettingsError
from bge_rerank_adapters.cli.serve import _bind, _keep_to_quota, _warn_if_open, serve
from bge_rerank_adapters.serve import ServerSettings, create_app
from bge_rerank_adapters.serve.container import cpu_quota, is_injected, whole_cpus
from tests.test_cli import invoke, plain

DEPLOY = Path(__file__).parent.parent / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
MANIFESTS = {
    each["kind"]: each
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text("utf-8"))
}
[CONTAINER] = MANIFESTS["Deployment"]["spec"]["template"]["spec"]["containers"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
LABELS = {"app.kubernetes.io/name": "bge-rerank"}


def paths() -> set[str]:
    return set(create_app(ServerSettings()).openapi()["paths"])


def default_port() -> int:
    return int(signature(serve).parameters["port"].default)


def instruction(name: str) -> str:
    [found] = re.findall(rf"^{name} ((?:.*\\\n)*.*)$", DOCKERFILE, flags=re.MULTILINE)
    return str(found)


# Docker


def test_the_image_runs_the_command_as_it_is():
    command = json.loads(instruction("ENTRYPOINT"))
    assert command[:2] == ["bge-rerank", "serve"]
    shown = plain(invoke("serve", "--help").output)
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert all(option in shown for option in options)
    assert int(options["--port"]) == int(instruction("EXPOSE")) == default_port()
    assert options["--host"] == "0.0.0.0"  # noqa: S104 - in a container of its own
    url = re.findall(r"http://[^']+", instruction("HEALTHCHECK"))[0]
    assert url == f"http://127.0.0.1:{default_port()}/health"
    assert "/health" in paths()
    assert "Not built by this project's tests" in DOCKERFILE


def test_the_image_has_all_that_the_package_is_built_of():
    [copied] = re.findall(r"^COPY (pyproject.*) \./$", DOCKERFILE, flags=re.MULTILINE)
    for name in (*copied.split(), "bge_rerank_adapters"):
        assert (DEPLOY.parent / name).exists()
    extras = re.findall(r"\[([a-z,]+)\]\"", DOCKERFILE)[0].split(",")
    project = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{each} = \[", project, flags=re.MULTILINE) for each in extras)


def test_variables_of_the_image_and_of_compose_are_settings():
    name, _, value = instruction("ENV").partition("=")
    [service] = COMPOSE["services"].values()
    variables = dict(service["environment"])
    assert variables["BGE_RERANK_API_KEY"].startswith("${BGE_RERANK_API_KEY:?")
    variables["BGE_RERANK_API_KEY"] = "secret"
    settings = ServerSettings.from_environment(variables | {name: value})
    assert settings.engine.cache_dir == value
    assert f"models:{value}" in service["volumes"]
    assert service["ports"] == [f"127.0.0.1:{default_port()}:{default_port()}"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert (
        int(service["stop_grace_period"].rstrip("s")) > settings.timeout_s + settings.body_timeout_s
    )


# Kubernetes


def test_probes_and_monitors_ask_what_the_server_answers():
    [port] = CONTAINER["ports"]
    assert port["containerPort"] == default_port()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = CONTAINER[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert asked["path"] in paths()
    [endpoint] = MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    assert endpoint["path"] in paths()
    [served] = MANIFESTS["Service"]["spec"]["ports"]
    assert served["targetPort"] == port["name"]


def test_all_of_them_mean_the_same_pods_and_the_same_secret():
    deployment = MANIFESTS["Deployment"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == LABELS
    assert deployment["selector"]["matchLabels"] == LABELS
    assert MANIFESTS["Service"]["spec"]["selector"] == LABELS
    assert MANIFESTS["PodMonitor"]["spec"]["selector"]["matchLabels"] == LABELS
    [key] = [each for each in CONTAINER["env"] if "valueFrom" in each]
    [endpoint] = MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert key["valueFrom"]["secretKeyRef"] == endpoint["authorization"]["credentials"]


def test_variables_of_the_pods_are_settings_and_time_is_left_to_answer():
    environment = {each["name"]: each.get("value", "secret") for each in CONTAINER["env"]}
    settings = ServerSettings.from_environment(environment | injected("bge-rerank"))
    assert settings.api_key == "secret"
    pod = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.timeout_s + settings.body_timeout_s + 5
    mounted = {each["mountPath"]: each["name"] for each in CONTAINER["volumeMounts"]}
    assert instruction("ENV").partition("=")[2] in mounted
    assert set(mounted.values()) == {each["name"] for each in pod["volumes"]}
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsUser"] == int(instruction("USER"))
    assert set(CONTAINER["resources"]) == {"requests", "limits"}


def injected(service: str, *, port: int = 8000, name: str = "http") -> dict[str, str]:
    """Return what Kubernetes sets for a Service, as its documentation lists it."""
    start = service.upper().replace("-", "_")
    return {
        f"{start}_SERVICE_HOST": "10.0.0.11",
        f"{start}_SERVICE_PORT": f"{port}",
        f"{start}_SERVICE_PORT_{name.upper()}": f"{port}",
        f"{start}_PORT": f"tcp://10.0.0.11:{port}",
        f"{start}_PORT_{port}_TCP": f"tcp://10.0.0.11:{port}",
        f"{start}_PORT_{port}_TCP_PROTO": "tcp",
        f"{start}_PORT_{port}_TCP_PORT": f"{port}",
        f"{start}_PORT_{port}_TCP_ADDR": "10.0.0.11",
    }


@pytest.mark.parametrize("service", ["bge-rerank", "bge-rerank-gpu", "bge-rerank-port-2"])
def test_a_services_variables_stop_no_server(service):
    variables = injected(service)
    assert all(is_injected(name, value) for name, value in variables.items())
    assert ServerSettings.from_environment(variables) == ServerSettings()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("BGE_RERANK_PORT", "8000", "known are"),
        ("BGE_RERANK_PORTS", "tcp://1.2.3.4:80", "known are"),
        ("BGE_RERANK_API_KEYS", "secret", "did you mean BGE_RERANK_API_KEY?"),
        ("BGE_RERANK_TIMEOUT", "3", "did you mean BGE_RERANK_TIMEOUT_S?"),
        ("BGE_RERANK_SERVICE_HOSTS", "10.0.0.11", "known are"),
        ("BGE_RERANK_PORT_8000_TCP_KEY", "x", "known are"),
    ],
)
def test_other_unknown_variables_still_do(name, value, meant):
    with pytest.raises(SettingsError, match=re.escape(f"{name} is not a setting; {meant}")):
        ServerSettings.from_environment(injected("bge-rerank") | {name: value})


# What others reach


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [
        ("0.0.0.0", None, True),  # noqa: S104
        ("::", None, True),
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", "secret", False),  # noqa: S104
    ],
)
def test_a_server_that_lets_everyone_in_starts_with_a_warning(capsys, host, key, warned):
    with _bind(host, 0) as listener:
        _warn_if_open(ServerSettings(api_key=key), listener)
    told = capsys.readouterr().err
    assert ("has no API key: set BGE_RERANK_API_KEY" in told) == warned
    assert bool(told) == warned


# The processor's quota


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", "utf-8")
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 30 0:31 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
GROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        # Docker and containerd, version 2: a namespace of its own, so that the path is "/".
        (
            {
                "proc/self/cgroup": "0::/",
                "proc/self/mountinfo": V2,
                f"{GROUP}/cpu.max": "150000 100000",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "0::/",
                "proc/self/mountinfo": V2,
                f"{GROUP}/cpu.max": "max 100000",
            },
            None,
        ),
        # systemd, version 2: the least of all groups above counts.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service",
                "proc/self/mountinfo": V2,
                f"{GROUP}/a.slice/b.service/cpu.max": "400000 100000",
                f"{GROUP}/a.slice/cpu.max": "200000 100000",
            },
            2.0,
        ),
        # Docker, version 1: what is mounted is the container's group.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/",
                "proc/self/mountinfo": V1.format(root="/docker/abc"),
                f"{GROUP}/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                f"{GROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x",
                "proc/self/mountinfo": V1.format(root="/"),
                f"{GROUP}/cpu,cpuacct/x/cpu.cfs_quota_us": "-1",
                f"{GROUP}/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "nonsense", "proc/self/mountinfo": "nonsense - x"}, None),
        ({}, None),
    ],
    ids=["v2", "v2-max", "v2-nested", "v1", "v1-none", "nonsense", "no-linux"],
)
def test_a_quota_is_read_from_both_versions_of_control_groups(tmp_path, files, quota):
    assert cpu_quota(write(tmp_path, files)) == quota


def test_a_quotas_threads_are_whole():
    assert [whole_cpus(each) for each in (0.1, 1.0, 1.5, 4.0)] == [1, 1, 2, 4]


def test_the_command_keeps_to_the_quota(monkeypatch):
    from bge_rerank_adapters.engine.models.cpu import threads

    asked: list[Any] = []
    monkeypatch.setattr(threads, "use_at_most", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("bge_rerank_adapters.serve.container.cpu_quota", lambda: 1.5)
    _keep_to_quota()
    monkeypatch.setattr("bge_rerank_adapters.serve.container.cpu_quota", lambda: None)
    _keep_to_quota()
    monkeypatch.setattr("bge_rerank_adapters.serve.container.cpu_quota", lambda: 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    _keep_to_quota()
    assert asked == [2]
