from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.conftest import ROOT, program
from tests.docker.dockerfile import DOCKERFILE, parse

COMPOSE = ROOT / "docker/compose.yaml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def complaints(path: Path) -> str:
    """What the Compose specification's own schema, which check-jsonschema carries, finds wrong."""
    check = program("check-jsonschema", "PyPI check-jsonschema")
    result = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", str(path)], capture_output=True, text=True
    )
    return "" if result.returncode == 0 else result.stdout


def test_the_file_follows_the_compose_specification() -> None:
    assert complaints(COMPOSE) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "where"),
    [
        ("restart: unless-stopped", "restrat: unless-stopped", "restrat"),
        ("profiles: [gpu]", "profiles: gpu", "profiles"),
        ("retention.time=90d", "retention.time=90d\n    ports: 9090", "ports"),
    ],
)
def test_the_schema_finds_a_fault(tmp_path: Path, right: str, wrong: str, where: str) -> None:
    text = COMPOSE.read_text()
    assert right in text
    (broken := tmp_path / "compose.yaml").write_text(text.replace(right, wrong, 1))
    assert where in complaints(broken)


def test_images_are_targets_of_the_dockerfile_or_pinned(services: dict[str, Any]) -> None:
    stages = parse(DOCKERFILE.read_text())
    for service in services.values():
        if "build" in service:
            assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)
            assert service["build"]["target"] in stages
        else:
            assert service["image"].partition(":")[2] not in ("", "latest")


def test_files_that_are_mounted_exist(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).is_dir(), source


def test_every_server_is_one_that_prometheus_asks(services: dict[str, Any]) -> None:
    scrape = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    (name,) = scrape["dns_sd_configs"][0]["names"]
    servers = {key for key in services if key.startswith("server")}
    assert servers == {key for key, value in services.items() if name in str(value.get("networks"))}
    assert len(servers) == 3


def test_the_router_knows_the_servers_of_its_profile(services: dict[str, Any]) -> None:
    urls = [word for word in services["router"]["command"] if word.startswith("http")]
    expected = [name for name, value in services.items() if name.startswith("server") and "gpu" not in str(value)]
    assert urls == [f"http://{name}:30000" for name in ("server", "server-2")]
    assert sorted(expected) == ["server", "server-2"]


def test_the_key_comes_from_outside(services: dict[str, Any]) -> None:
    for name in ("server", "server-cuda", "server-2", "router"):
        assert services[name]["environment"]["SGLANG_AUF_API_KEY"] is None


def test_mirrors_are_those_of_the_shell(services: dict[str, Any]) -> None:
    for name in ("server", "server-cuda", "server-2"):
        mirrors = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "PIP_INDEX_URL")
        assert [services[name]["environment"].get(mirror, "missing") for mirror in mirrors] == [None] * 3
    for service in services.values():
        assert "build" not in service or service["build"]["args"] == {"PIP_INDEX_URL": None}


def test_ports_are_this_machines_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports)) == 5
    assert all(port.startswith(("127.0.0.1:", "${AUF_BIND:-127.0.0.1}:")) for port in ports)
