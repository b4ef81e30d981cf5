"""Checks of the Kubernetes manifests: that they are well formed, hardened, and right about the product."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families
from support.promql import names_and_labels

from pyllm.engine.config import from_values
from pyllm.engine.messages import EngineStats
from pyllm.server.app import create_app
from pyllm.server.arguments import load_config, unknown_variables
from pyllm.server.flags import ServerConfig
from pyllm.server.generation.metrics import Metrics
from pyllm.server.http.middleware import PROBES
from pyllm.server.service import Service

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
KUBERNETES_VERSIONS = ("1.30", "1.37")
"""The oldest one that the manifests are for, and the newest one that kubernetes-validate knows."""
CUSTOM_KINDS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("custom_kinds/*.json")}
COMPONENTS = ("gateway", "shared-responses", "kv-events")
"""Those that no overlay has."""
ADAPTER = "PrometheusAdapter"
"""The kind that the values for the Prometheus Adapter get here; they are no object of Kubernetes."""
CACHE, USER = "/home/pyllm/.cache", 10001
AFTER_DRAIN_SECONDS = 10  # until the last errors are sent and the engine has ended
Documents = list[dict[str, Any]]


def kustomize(folder: Path) -> Documents:
    """Every object of a kustomization."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def everything(folder: Path) -> Documents:
    """The GPU's overlay with the components that it lacks, made in `folder`, and the adapter's values."""
    parts = {"resources": ["overlays/gpu"], "components": [f"components/{name}" for name in COMPONENTS]}
    content = {name: [os.path.relpath(FOLDER / path, folder) for path in paths] for name, paths in parts.items()}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    values = yaml.safe_load((FOLDER / "components/autoscaling/prometheus-adapter.yaml").read_text(encoding="utf-8"))
    return [*kustomize(folder), *kustomize(FOLDER / "rayservice"), {"kind": ADAPTER, **values}]


def of_kind(documents: Documents, kind: str) -> Iterator[dict[str, Any]]:
    """The objects of a kind."""
    return (document for document in documents if document["kind"] == kind)


def the(documents: Documents, kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (document,) = of_kind(documents, kind)
    return document


def pod(documents: Documents) -> dict[str, Any]:
    """The specification of the server's pods."""
    spec: dict[str, Any] = the(documents, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(documents: Documents) -> dict[str, Any]:
    """The server's container."""
    (found,) = pod(documents)["containers"]
    return dict(found)


def ray_groups(documents: Documents) -> list[dict[str, Any]]:
    """The head and the workers of each Ray cluster."""
    clusters = [document["spec"]["rayClusterConfig"] for document in of_kind(documents, "RayService")]
    return [group for cluster in clusters for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def all_pods(documents: Documents) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The specification of every pod, with its container."""
    templates = [document["spec"]["template"] for document in of_kind(documents, "Deployment")]
    for template in templates + [group["template"] for group in ray_groups(documents)]:
        (found,) = template["spec"]["containers"]
        yield template["spec"], found


def server_config(documents: Documents) -> ServerConfig:
    """The flags of the server, from the image's entry point, the arguments and the variables."""
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[-1])
    assert entry[:2] == ["pyllm", "serve"]
    own = container(documents)
    assert unknown_variables({item["name"]: "" for item in own["env"]}, ServerConfig, ()) == []
    variables = {item["name"]: item["value"] for item in own["env"] if "value" in item}
    return load_config(ServerConfig, entry[2:] + own["args"], variables, program="pyllm serve", description="")


def check_core_kinds(documents: Documents) -> None:
    """Each core object is valid, without unknown fields."""
    import kubernetes_validate

    head = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pyllm"}}
    for document in [*documents, *(head | {"template": group["template"]} for group in ray_groups(documents))]:
        if document["kind"] not in (*CUSTOM_KINDS, ADAPTER):
            for version in KUBERNETES_VERSIONS:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except kubernetes_validate.SchemaNotFoundError as error:
                    raise AssertionError(error.message) from None


def check_custom_kinds(documents: Documents) -> None:
    """Each object of a custom kind fits its schema."""
    for document in documents:
        if schema := CUSTOM_KINDS.get(document["kind"]):
            jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


def check_hardening(documents: Documents) -> None:
    """No pod has rights that it does not need."""
    for spec, own in all_pods(documents):
        assert spec["enableServiceLinks"] is False, "a Service called pyllm would set PYLLM_ variables"
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert own["resources"]["requests"]["memory"] == own["resources"]["limits"]["memory"]
        assert own["resources"]["requests"]["cpu"]


def check_flags(documents: Documents) -> None:
    """The server accepts its flags and variables, needs a key, and finds its files."""
    config, own = server_config(documents), container(documents)
    mounts = {mount["mountPath"]: mount for mount in own["volumeMounts"]}
    assert config.api_key_file
    files = [config.api_key_file] + [config.model] * bool(config.model and config.model.startswith("/"))
    for path in files:
        assert any(mounts.get(str(parent), {}).get("readOnly") for parent in [Path(path), *Path(path).parents]), path


def check_files(documents: Documents) -> None:
    """What the server writes has a volume that the image's user may write; keys are for that user only."""
    assert f"install -d -o pyllm -g pyllm {CACHE}" in DOCKERFILE
    for spec, own in all_pods(documents):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert sorted(mount["name"] for mount in own["volumeMounts"]) == sorted(volumes)
        assert {mount["mountPath"] for mount in own["volumeMounts"] if not mount.get("readOnly")} == {"/tmp", CACHE}
        for volume in volumes.values():
            assert "secret" not in volume or volume["secret"]["defaultMode"] == 0o440


def check_image(documents: Documents) -> None:
    """Images are this version's, of a target that exists, with Ray for Ray, and run as their own user."""
    assert set(re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)) == {f"{USER}:{USER}"}
    for spec, own in all_pods(documents):
        name, _, tag = own["image"].partition(":")
        version, target, *extras = tag.split("-")
        assert name.split("/")[-1] == "pyllm"
        assert version == VERSION
        assert re.search(rf"^FROM runtime AS {target}$", DOCKERFILE, re.MULTILINE)
        assert extras == ["ray"] * own["name"].startswith("ray-")
        assert {spec["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}


def check_ports(documents: Documents) -> None:
    """Everything that names the server's port means the one on which it listens."""
    port = server_config(documents).port
    assert f"EXPOSE {ServerConfig().port}" in DOCKERFILE
    declared = next(item for item in container(documents)["ports"] if item["name"] == "http")
    assert declared["containerPort"] == port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container(documents)[probe]["httpGet"]["port"] == declared["name"]
    (service,) = the(documents, "Service")["spec"]["ports"]
    assert service["targetPort"] == declared["name"]
    for monitor in of_kind(documents, "ServiceMonitor"):
        assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == [service["name"]]
    for pool in of_kind(documents, "InferencePool"):
        assert pool["spec"]["targetPorts"] == [{"number": port}]


def check_paths(documents: Documents) -> None:
    """Probes and Prometheus ask routes that exist, need no key, and say what the probe is about."""
    app = create_app(Service(ServerConfig()))
    routes = {route.path for route in app.routes if "GET" in (getattr(route, "methods", None) or ())}
    own = container(documents)
    paths = {probe: own[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/ready", "livenessProbe": "/health", "readinessProbe": "/ready"}
    metrics = {endpoint["path"] for monitor in of_kind(documents, "ServiceMonitor")
               for endpoint in monitor["spec"]["endpoints"]}  # fmt: skip
    assert metrics <= {"/metrics"}
    assert {*paths.values(), *metrics} <= routes & PROBES


def check_times(documents: Documents) -> None:
    """The pod outlives its longest stream, and the rollout its longest start."""
    spec, own = pod(documents), container(documents)
    wait = own["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert wait >= 5, "routers need a moment to learn that the pod ends"
    drain = server_config(documents).shutdown_timeout
    assert drain > ServerConfig().shutdown_timeout, "the longest stream takes longer"
    assert spec["terminationGracePeriodSeconds"] >= wait + drain + AFTER_DRAIN_SECONDS
    start = own["startupProbe"]["failureThreshold"] * own["startupProbe"]["periodSeconds"]
    assert 1800 <= start < the(documents, "Deployment")["spec"]["progressDeadlineSeconds"]
    for monitor in of_kind(documents, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert int(endpoint["scrapeTimeout"][:-1]) < int(endpoint["interval"][:-1])


def check_selectors(documents: Documents) -> None:
    """Everything that selects pods or a Deployment finds the server's."""
    deployment = the(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service = the(documents, "Service")
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    for kind in ("PodDisruptionBudget", "InferencePool"):
        selectors += [document["spec"]["selector"]["matchLabels"] for document in of_kind(documents, kind)]
    selectors += [item["labelSelector"]["matchLabels"] for item in pod(documents)["topologySpreadConstraints"]]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    for monitor in of_kind(documents, "ServiceMonitor"):
        own = service["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= own.items()
        jobs = yaml.safe_load((ROOT / "docker/monitoring/prometheus.yaml").read_text(encoding="utf-8"))
        assert own[monitor["spec"]["jobLabel"]] == jobs["scrape_configs"][0]["job_name"], "the alerts expect this job"
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
        assert "replicas" not in deployment["spec"], "they would undo what the autoscaler did"
        assert scaler["spec"]["minReplicas"] > 1, "a lone pod leaves nothing while it is replaced"


def check_metrics(documents: Documents) -> None:
    """The autoscaler's metrics are the adapter's, and the adapter's are the server's."""
    families = text_string_to_metric_families(Metrics("m", EngineStats).exposition().decode())
    exposed = {sample.name for family in families for sample in family.samples}
    offered = set()
    for adapter in of_kind(documents, ADAPTER):
        for rule in adapter["rules"]["custom"]:
            offered.add(rule["name"]["as"])
            query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("{<<.LabelMatchers>>}", "")
            named = {name for text in (query, rule["seriesQuery"]) for name, _ in names_and_labels(text) if name}
            assert named
            assert named <= exposed, f"the server has no {named - exposed}"
            assert rule["seriesQuery"].partition("{")[0] in query
            assert rule["metricsQuery"].count("<<.LabelMatchers>>") == query.count("pyllm:")
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        named = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
        assert named <= offered, f"no rule offers {named - offered}"
    if any(of_kind(documents, "InferencePool")):
        assert server_config(documents).metrics_vllm_names, "endpoint pickers read vLLM's names"


def check_events(documents: Documents) -> None:
    """The events of the KV cache are published on the declared ports, which only the endpoint picker reaches."""
    config = server_config(documents).kv_events_config
    ports = {item["name"]: item["containerPort"] for item in container(documents)["ports"]}
    policies = list(of_kind(documents, "NetworkPolicy"))
    assert bool(config) == bool(policies)
    if config is not None:
        assert config.enabled
        addresses = [f"tcp://*:{ports[name]}" for name in ("kv-events", "kv-replay")]
        assert [config.endpoint, config.replay_endpoint] == addresses
        assert config.topic.split("@")[:2] == ["kv", "$(POD_IP)"]
        assert "POD_IP" in {item["name"] for item in container(documents)["env"]}
        (policy,) = policies
        labels = the(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        everyone, picker = policy["spec"]["ingress"]
        assert everyone == {"ports": [{"port": "http"}]}
        assert [item["port"] for item in picker["ports"]] == ["kv-events", "kv-replay"]
        (source,) = picker["from"]
        name = source["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
        assert {pool["spec"]["endpointPickerRef"]["name"] for pool in of_kind(documents, "InferencePool")} <= {name}


def check_ray(documents: Documents) -> None:
    """Ray Serve gets an application that exists, flags that the server accepts, and time to drain."""
    for document in of_kind(documents, "RayService"):
        spec = document["spec"]
        serve = yaml.safe_load(spec["serveConfigV2"])
        (application,) = serve["applications"]
        module, _, name = application["import_path"].partition(":")
        assert importlib.util.find_spec(module)
        source = (ROOT / "server/replicas/application.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE)
        config = from_values(ServerConfig, application["args"])
        (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
        (worker,) = workers["template"]["spec"]["containers"]
        mounts = {mount["mountPath"] for mount in worker["volumeMounts"] if mount.get("readOnly")}
        assert {config.model, str(Path(config.api_key_file or "").parent)} == mounts
        assert config.replicas == workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
        (port,) = worker["ports"]
        assert serve["http_options"] == {"host": "0.0.0.0", "port": port["containerPort"]}
        assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port["name"]}
        drain = config.shutdown_timeout + AFTER_DRAIN_SECONDS
        assert spec["rayClusterDeletionDelaySeconds"] >= drain
        assert workers["template"]["spec"]["terminationGracePeriodSeconds"] >= drain
        (extra,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["ray"])
        assert spec["rayClusterConfig"]["rayVersion"] in extra.specifier
        for group in ray_groups([document]):
            variables = {item["name"]: item["value"] for item in group["template"]["spec"]["containers"][0]["env"]}
            front, _, name = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
            path = ROOT / Path(*front.split(".")[1:]).with_suffix(".py")
            assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert variables["RAY_USAGE_STATS_ENABLED"] == "0"


CHECKS: dict[str, Callable[[Documents], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_core_kinds, check_custom_kinds, check_hardening, check_flags, check_files, check_image, check_ports,
        check_paths, check_times, check_selectors, check_metrics,
        check_events, check_ray,
    )
}  # fmt: skip


def change(document: dict[str, Any], path: str, value: Any) -> None:
    """Set what is at `path`, whose steps are separated by spaces; `...` as the value removes it."""
    *steps, last = path.split(" ")
    place: Any = document
    for step in steps:
        place = place[int(step) if isinstance(place, list) else step]
    key = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    elif key == len(place) and isinstance(place, list):
        place.append(value)
    else:
        place[key] = value


def failing(documents: Documents, names: Iterable[str] = CHECKS) -> list[str]:
    """The names of the checks that fail."""
    found = []
    for name in names:
        try:
            CHECKS[name](documents)
        except (AssertionError, KeyError, ValueError, jsonschema.ValidationError):
            found.append(name)
    return found
