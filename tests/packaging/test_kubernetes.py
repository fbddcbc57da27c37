"""deploy/k8s, against the schemas of the Kubernetes API, without a cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from optimd.server import ServerConfig
from tests.support import ROOT

K8S = ROOT / "deploy" / "k8s"
MANIFESTS = sorted(path for path in (K8S / "base").glob("*.yaml") if path.name != "kustomization.yaml")
FOLDERS = sorted(path.parent for path in K8S.glob("**/kustomization.yaml"))
VERSIONS = ("1.30", "1.34")


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def validate(resources: list[dict[str, Any]]) -> None:
    """Fields that the API does not know are errors."""
    for resource in resources:
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)


def containers(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pods = [resource["spec"]["template"]["spec"] for resource in resources if "template" in resource.get("spec", {})]
    return [container for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_the_api_takes(path: Path) -> None:
    """All that the base names are there."""
    resources = documents(path.read_text(encoding="utf-8"))
    assert resources
    validate(resources)
    assert path.name in (K8S / "base" / "kustomization.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(K8S)))
def test_what_kustomize_makes_of_them_is_what_the_api_takes(folder: Path) -> None:
    """Overlays change what they are to change, and nothing gets lost."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    made = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert made.returncode == 0, made.stderr
    resources = documents(made.stdout)
    validate(resources)
    assert {resource["kind"] for resource in resources} == {
        "Service",
        "StatefulSet",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "Job",
    }
    (server, worker) = sorted(containers(resources), key=lambda each: str(each["name"]))
    told = {item["name"]: item.get("value") for item in server["env"]}
    is_secure = folder.name == "tls"
    assert told["OPTIMD_INSECURE"] == ("0" if is_secure else "1")
    assert ("OPTIMD_TLS_CERT" in told) == is_secure
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (folder.name == "gpu")
    assert {"OPTIMD_SERVER", "OPTIMD_JOB", "RANK", "WORLD_SIZE"} <= {item["name"] for item in worker["env"]}


def test_settings_of_the_server_are_settings() -> None:
    """In Kubernetes, in compose files and in the image: a misspelt one would do nothing."""
    known = {f"OPTIMD_{name.upper()}" for name in ServerConfig.__dataclass_fields__} | {"OPTIMD_LOG_FORMAT"}
    places = [*K8S.glob("**/server.yaml"), *(ROOT / "deploy").glob("compose*.yaml"), ROOT / "docker/server.Dockerfile"]
    workers = {"OPTIMD_SERVER", "OPTIMD_JOB", "OPTIMD_TLS_CA", "OPTIMD_CLIENT_CERT", "OPTIMD_CLIENT_KEY"}
    for path in places:
        words = path.read_text(encoding="utf-8").replace('"', " ").replace("=", " ").replace(":", " ").replace(",", " ")
        named = {word for word in words.split() if word.startswith("OPTIMD_") and not word.endswith("_")}
        assert named - {"OPTIMD_INSECURE="} <= known | workers, path


def test_pods_may_do_no_more_than_they_have_to() -> None:
    """Nobody's user, no way to more rights, a root that cannot be written to."""
    resources = [each for path in MANIFESTS for each in documents(path.read_text(encoding="utf-8"))]
    found = containers(resources)
    assert len(found) == 2
    for container in found:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
    for resource in resources:
        if "template" in resource.get("spec", {}):
            pod = resource["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] is False
