"""The Kubernetes manifests are valid, hardened and right about the product, and each check notices a mistake."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import CHECKS, FOLDER, Documents, change, everything, failing, kustomize, the

pytestmark = pytest.mark.needs("kubectl", "kubernetes-validate")
POD = "spec template spec"
SERVER = f"{POD} containers 0"
HEAD, WORKERS = "spec rayClusterConfig headGroupSpec", "spec rayClusterConfig workerGroupSpecs 0"
WORKER = f"{WORKERS} template spec containers 0"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return everything(tmp_path_factory.mktemp("kustomization"))


@pytest.mark.parametrize("name", CHECKS)
def test_the_objects_pass_each_check(documents: Documents, name: str) -> None:
    CHECKS[name](documents)


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_passes_the_checks(overlay: str) -> None:
    found = kustomize(FOLDER / "overlays" / overlay)
    for name in CHECKS.keys() - {"metrics"}:
        CHECKS[name](found)
    image = the(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image.endswith({"cpu": "-cpu", "gpu": "-cuda"}[overlay])


def test_a_model_on_a_volume_passes_the_checks(tmp_path: Path) -> None:
    parts = {"resources": ["overlays/cpu"], "components": ["components/model-volume"]}
    up = "../" * len(tmp_path.parts)
    content = {name: [up + str(FOLDER / path)[1:] for path in paths] for name, paths in parts.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert failing(kustomize(tmp_path)) == []


def test_the_example_of_the_page_passes_the_checks(tmp_path: Path) -> None:
    page = (FOLDER.parents[1] / "docs" / "fleet.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n# kustomization.yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "pyllm").symlink_to(FOLDER.parents[1])
    (tmp_path / "kustomization.yaml").write_text(example, encoding="utf-8")
    found = kustomize(tmp_path)
    assert failing(found, CHECKS.keys() - {"metrics"}) == []
    assert "--max-num-seqs=128" in the(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]


def test_every_file_belongs_to_a_kustomization(documents: Documents) -> None:
    used = {"prometheus-adapter.yaml"}
    for path in FOLDER.rglob("kustomization.yaml"):
        used |= {Path(name).name for name in yaml.safe_load(path.read_text(encoding="utf-8")).get("resources", [])}
    files = {path.name for path in FOLDER.rglob("*.yaml")} - {"kustomization.yaml"}
    assert files <= used
    names = {document["metadata"]["name"] for document in documents if "metadata" in document}
    assert names == {"pyllm"}


@pytest.mark.parametrize(
    ("check", "kind", "path", "value"),
    [
        ("core_kinds", "Deployment", "spec replica", 3),
        ("core_kinds", "Deployment", f"{SERVER} livenessProbe httpGet port", ...),
        ("core_kinds", "Service", "spec ports 0 port", "http"),
        ("core_kinds", "PodDisruptionBudget", "apiVersion", "policy/v1beta1"),
        ("core_kinds", "HorizontalPodAutoscaler", "spec metrics 0 pods target type", ...),
        ("custom_kinds", "InferencePool", "spec endpointPickerRef port", ...),
        ("custom_kinds", "InferencePool", "spec extensionRef", {"name": "pyllm-epp"}),
        ("custom_kinds", "InferencePool", "apiVersion", "inference.networking.x-k8s.io/v1alpha2"),
        ("custom_kinds", "ServiceMonitor", "spec endpoints 0 interval", "5 s"),
        ("custom_kinds", "ServiceMonitor", "spec selectors", {}),
        ("hardening", "Deployment", f"{POD} enableServiceLinks", ...),
        ("hardening", "Deployment", f"{POD} automountServiceAccountToken", True),
        ("hardening", "Deployment", f"{POD} hostNetwork", True),
        ("hardening", "Deployment", f"{POD} securityContext runAsNonRoot", ...),
        ("hardening", "Deployment", f"{POD} securityContext seccompProfile", {"type": "Unconfined"}),
        ("hardening", "Deployment", f"{SERVER} securityContext readOnlyRootFilesystem", ...),
        ("hardening", "Deployment", f"{SERVER} securityContext capabilities drop", []),
        ("hardening", "Deployment", f"{SERVER} resources limits memory", ...),
        ("flags", "Deployment", f"{SERVER} args 0", "--prot=8000"),
        ("flags", "Deployment", f"{SERVER} args 1", "--api-key-file=/etc/pyllm/keys"),
        ("flags", "Deployment", f"{SERVER} args 2", "--shutdown-timeout=ten"),
        ("flags", "Deployment", f"{SERVER} env 0 name", "PYLLM_LOGFORMAT"),
        ("flags", "Deployment", f"{SERVER} env 0 value", "yaml"),
        ("flags", "Deployment", f"{SERVER} args 3", "--model=/model"),
        ("flags", "Deployment", f"{SERVER} env 2 name", "PYLLM_RESPONSES_STORE"),
        ("files", "Deployment", f"{SERVER} volumeMounts 0", ...),
        ("files", "Deployment", f"{SERVER} volumeMounts 1 mountPath", "/home/other/.cache"),
        ("files", "Deployment", f"{POD} volumes 2 secret defaultMode", 0o444),
        ("image", "Deployment", f"{SERVER} image", "pyllm:latest"),
        ("image", "Deployment", f"{SERVER} image", "pyllm:0.1.0-gpu"),
        ("image", "Deployment", f"{POD} securityContext fsGroup", 1000),
        ("ports", "Deployment", f"{SERVER} args 0", "--port=8080"),
        ("ports", "Deployment", f"{SERVER} ports 0 containerPort", 8080),
        ("ports", "Service", "spec ports 0 targetPort", "https"),
        ("ports", "ServiceMonitor", "spec endpoints 0 port", "metrics"),
        ("ports", "InferencePool", "spec targetPorts 0 number", 8080),
        ("paths", "Deployment", f"{SERVER} livenessProbe httpGet path", "/healthz"),
        ("paths", "Deployment", f"{SERVER} livenessProbe httpGet path", "/ready"),
        ("paths", "Deployment", f"{SERVER} readinessProbe httpGet path", "/v1/models"),
        ("paths", "ServiceMonitor", "spec endpoints 0 path", "/metric"),
        ("times", "Deployment", f"{POD} terminationGracePeriodSeconds", 610),
        ("times", "Deployment", f"{SERVER} args 2", "--shutdown-timeout=630"),
        ("times", "Deployment", f"{SERVER} lifecycle", ...),
        ("times", "Deployment", f"{SERVER} startupProbe failureThreshold", 30),
        ("times", "Deployment", "spec progressDeadlineSeconds", 600),
        ("selectors", "Service", "spec selector", {"app": "pyllm"}),
        ("selectors", "PodDisruptionBudget", "spec selector matchLabels", {"app.kubernetes.io/name": "pylm"}),
        ("selectors", "InferencePool", "spec selector matchLabels", {"app": "vllm"}),
        ("selectors", "HorizontalPodAutoscaler", "spec scaleTargetRef name", "pyllm-gpu"),
        ("selectors", "ServiceMonitor", "spec selector matchLabels", {"app": "pyllm"}),
        ("selectors", "Deployment", "spec replicas", 2),
        ("metrics", "HorizontalPodAutoscaler", "spec metrics 0 pods metric name", "pyllm_requests_running"),
        ("metrics", "PrometheusAdapter", "rules custom 0 seriesQuery", "pyllm:requests_running{pod!=''}"),
        ("metrics", "PrometheusAdapter", "rules custom 1 name as", "pyllm_kv_usage"),
        ("metrics", "PrometheusAdapter", "rules custom 1 metricsQuery", "max(pyllm:kv_cache_usage_perc)"),
        ("metrics", "Deployment", f"{SERVER} args 5", "--no-metrics-vllm-names"),
        ("events", "NetworkPolicy", "spec ingress 0 ports", ...),
        ("events", "NetworkPolicy", "spec ingress 1 from", ...),
        ("events", "NetworkPolicy", "spec podSelector", {}),
        ("events", "Deployment", f"{SERVER} ports 1 containerPort", 5556),
        ("events", "Deployment", f"{SERVER} args 6", "--kv-events-config={}"),
        ("events", "Deployment", f"{SERVER} env 3 name", "POD_ADDRESS"),
        ("core_kinds", "RayService", f"{HEAD} template spec container", []),
        ("core_kinds", "RayService", f"{WORKER} livenessProbe httpGet port", ...),
        ("custom_kinds", "RayService", "apiVersion", "ray.io/v1alpha1"),
        ("custom_kinds", "RayService", "spec upgradeStrategy type", "Rolling"),
        ("custom_kinds", "RayService", f"{WORKERS} minReplicas", "2"),
        ("custom_kinds", "RayService", f"{HEAD} rayStartParams num-cpus", 0),
        ("hardening", "RayService", f"{HEAD} template spec automountServiceAccountToken", ...),
        ("hardening", "RayService", f"{WORKER} securityContext readOnlyRootFilesystem", False),
        ("files", "RayService", f"{WORKER} volumeMounts 1", ...),
        ("image", "RayService", f"{WORKER} image", "pyllm:0.1.0-cuda"),
        ("image", "RayService", f"{HEAD} template spec securityContext runAsUser", 1000),
        ("ray", "RayService", "spec rayClusterDeletionDelaySeconds", 60),
        ("ray", "RayService", "spec rayClusterConfig rayVersion", "2.46.0"),
        ("ray", "RayService", f"{WORKERS} maxReplicas", 1),
        ("ray", "RayService", f"{WORKERS} template spec terminationGracePeriodSeconds", 30),
        ("ray", "RayService", f"{WORKER} resources limits nvidia.com/gpu", "2"),
        ("ray", "RayService", f"{WORKER} readinessProbe httpGet path", "/ready"),
        ("ray", "RayService", f"{WORKER} env 1 value", "pyllm.server.replicas.front:middleware"),
        ("ray", "RayService", f"{WORKER} volumeMounts 3 mountPath", "/models"),
    ],
)
def test_a_planted_mistake_is_noticed(documents: Documents, check: str, kind: str, path: str, value: Any) -> None:
    changed = copy.deepcopy(documents)
    change(the(changed, kind), path, value)
    assert failing(changed, [check]) == [check]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pyllm.server.replicas:app", "pyllm.server.replica:app"),
        ("pyllm.server.replicas:app", "pyllm.server.replicas:build_app"),
        ("shutdown_timeout: 600", "shutdown_timeouts: 600"),
        ("shutdown_timeout: 600", "shutdown_timeout: 900"),
        ("replicas: 2", "replicas: 4"),
        ("model: /model", "model: /models"),
        ("port: 8000", "port: 8080"),
        ("host: 0.0.0.0", "host: 127.0.0.1"),
    ],
)
def test_a_mistake_in_the_config_of_ray_serve_is_noticed(documents: Documents, old: str, new: str) -> None:
    changed = copy.deepcopy(documents)
    spec = the(changed, "RayService")["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)
    assert failing(changed, ["ray"]) == ["ray"]
