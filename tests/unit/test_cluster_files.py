"""The files of cluster/: valid for what reads them, and of one mind with each other and the rest of the project."""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rlhf_ray.config import load_config
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import lay_out, misfits
from rlhf_ray.placement.plan import make_plan, shortfalls
from rlhf_ray.tracking.prometheus_names import METRICS, RAY_PREFIX, STATES, TAGS, exported_name

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = {"raycluster": "RayCluster", "rayjob": "RayJob"}
RAY_UP = ("aws", "gcp", "on_premise")
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
# Where the images hold the checkout.
IMAGE_FOLDER = "/opt/rlhf_ray/"

# The keys that KubeRay 1.7 knows, by the part of the manifest.
KNOWN_KEYS = {
    "RayJob": {
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "entrypointResources",
        "metadata",
        "preRunningDeadlineSeconds",
        "rayClusterSpec",
        "runtimeEnvYAML",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "submitterPodTemplate",
        "suspend",
        "ttlSecondsAfterFinished",
    },
    "RayCluster": {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "headGroupSpec",
        "networkPolicy",
        "rayVersion",
        "tlsOptions",
        "workerGroupSpecs",
    },
    "headGroupSpec": {"rayStartParams", "serviceType", "template"},
    "workerGroupSpecs": {
        "groupName",
        "idleTimeoutSeconds",
        "labels",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "priority",
        "rayStartParams",
        "replicas",
        "resources",
        "template",
    },
    "authOptions": {"mode"},
}
# Made by hand, as cluster/README.md says; in no manifest.
SECRETS_BY_HAND = {"rlhf-secrets": {"HF_TOKEN", "WANDB_API_KEY"}}


def ray_version() -> str:
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    (version,) = re.findall(r"^ray==(\S+)$", lock, re.MULTILINE)
    return version


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())


def shared() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay" / "shared.yaml").read_text())
    return {document["kind"]: document for document in documents}


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def templates(name: str) -> dict[str, dict[str, Any]]:
    """Every pod template of a manifest."""
    spec = cluster_spec(name)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    if name == "rayjob":
        found["submitter"] = manifest(name)["spec"]["submitterPodTemplate"]
    return found


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    return only


def in_checkout(path: str) -> Path:
    assert path.startswith(IMAGE_FOLDER), path
    return ROOT / path.removeprefix(IMAGE_FOLDER)


# Ray's version


def test_all_files_name_the_same_ray():
    version = ray_version()
    assert ray.__version__ == version
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"ray[default]=={version}" in extras["run"]
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".json", ".md")]
    files = [path for path in files if path.name not in ("shared.yaml", "nodes.yaml")]
    assert len(files) == len(KUBERAY) + len(RAY_UP) + len(DOCKERFILES) + 1
    for path in [*files, CLUSTER / "README.md"]:
        named = re.findall(r"\bray(?:Version:)?\W{0,3}(?:__version__ == ')?(\d+\.\d+\.\d+)", path.read_text())
        assert set(named) == {version}, path


# KubeRay


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_kuberay_manifests_have_known_keys_only(name, kind):
    document = manifest(name)
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    assert set(document["spec"]) <= KNOWN_KEYS[kind]
    spec = cluster_spec(name)
    assert set(spec) <= KNOWN_KEYS["RayCluster"]
    assert set(spec["headGroupSpec"]) <= KNOWN_KEYS["headGroupSpec"]
    assert set(spec["authOptions"]) <= KNOWN_KEYS["authOptions"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= KNOWN_KEYS["workerGroupSpecs"]


def test_job_and_cluster_describe_the_same_cluster():
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


@pytest.mark.parametrize("name", KUBERAY)
def test_rays_start_parameters_are_strings_that_ray_start_knows(name):
    spec = cluster_spec(name)
    program = Path(sys.executable).with_name("ray")
    known = subprocess.run([program, "start", "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        for key, value in group["rayStartParams"].items():
            assert isinstance(value, str), key
            assert f"--{key} " in known
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", KUBERAY)
def test_groups_are_labelled_by_role(name):
    groups = cluster_spec(name)["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["policy", "rollout", "scoring", "critic"]
    for group in groups:
        assert group["labels"] == {"role": group["groupName"]}
        assert group["template"]["metadata"]["labels"]["role"] == group["groupName"]
        # A run that finds too little at its start ends, so nothing may be left to an autoscaler.
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] >= 1


@pytest.mark.parametrize("name", KUBERAY)
def test_every_container_has_limits_and_few_rights(name):
    for role, template in templates(name).items():
        pod, main = template["spec"], container(template)
        assert main["resources"]["limits"].keys() >= {"cpu", "memory"}, role
        assert main["resources"]["requests"].keys() == main["resources"]["limits"].keys()
        # Kubernetes does not hand out more of a device than is requested.
        assert main["resources"]["limits"].get("nvidia.com/gpu") == main["resources"]["requests"].get("nvidia.com/gpu")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert main["securityContext"]["allowPrivilegeEscalation"] is False
        assert template["metadata"]["labels"]["app"] == "rlhf-ray"
    assert "nvidia.com/gpu" not in container(templates(name)["head"])["resources"]["limits"]


@pytest.mark.parametrize("name", KUBERAY)
def test_every_ray_pod_has_the_shared_storage_and_shared_memory(name):
    claim = shared()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for role, template in templates(name).items():
        if role == "submitter":
            continue
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(template)["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", KUBERAY)
def test_secrets_are_references_and_the_page_says_how_to_make_them(name):
    page = (CLUSTER / "README.md").read_text()
    named: dict[str, set[str]] = {}
    for template in templates(name).values():
        for entry in container(template).get("env", []):
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                assert entry["name"] == reference["key"]
                named.setdefault(reference["name"], set()).add(reference["key"])
            else:
                assert not re.search("TOKEN|KEY|SECRET|PASSWORD", entry["name"])
    assert named == SECRETS_BY_HAND
    for secret, keys in named.items():
        assert len(re.findall(rf"^kubectl create secret generic {secret} ", page, re.MULTILINE)) == 1
        assert all(f"`{key}=...`" in page for key in keys)


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_are_closed(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = shared()["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app": "rlhf-ray"}
    inside, metrics = policy["ingress"]
    assert {"podSelector": {"matchLabels": {"app": "rlhf-ray"}}} in inside["from"]
    ports = {port["name"]: port["containerPort"] for port in container(templates(name)["head"])["ports"]}
    assert [port["port"] for port in metrics["ports"]] == [ports["metrics"]]


def entrypoint() -> list[str]:
    return shlex.split(manifest("rayjob")["spec"]["entrypoint"])


def test_the_jobs_entrypoint_loads_and_continues_in_the_same_directory():
    program, stage, path, *overrides = entrypoint()
    assert (program, stage) == ("rlhf-ray", "ppo")
    config = load_config(in_checkout(path), overrides, "ppo")
    assert config.run.dir.startswith("/shared/runs/")
    assert config.run.resume == "auto"
    assert config.run.checkpoint_every > 0
    job = manifest("rayjob")["spec"]
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", KUBERAY)
def test_the_run_fits_into_the_pods(name):
    _, _, path, *overrides = entrypoint()
    plan = make_plan(load_config(in_checkout(path), overrides, "ppo"))
    nodes = []
    for group in cluster_spec(name)["workerGroupSpecs"]:
        limits = container(group["template"])["resources"]["limits"]
        cpus, gpus = float(limits["cpu"]), int(limits["nvidia.com/gpu"])
        nodes += [
            Node(name=f"{group['groupName']}-{i}", cpus=cpus, gpus=gpus, gpu_memory_gib=80.0, labels=group["labels"])
            for i in range(group["replicas"])
        ]
        # A group has the GPUs of its role.
        roles = ["reference", "reward"] if group["groupName"] == "scoring" else [group["groupName"]]
        needed = sum(plan.share(role, "GPU") * len(plan.groups[role]) for role in roles)
        assert gpus * group["replicas"] == needed
    assert misfits(plan, nodes) == []
    layout = lay_out(plan, nodes)
    assert layout.without == {}
    for seat in layout.seats:
        role = nodes[seat.node].labels["role"]
        assert role == ("scoring" if seat.group in ("reference", "reward") else seat.group)


# ray up


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_are_valid_for_the_installed_ray(name):
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    head = filled["available_node_types"][filled["head_node_type"]]
    assert head["resources"].get("CPU", 0) == 0
    text = "\n".join(filled["head_start_ray_commands"] + filled["worker_start_ray_commands"])
    assert text.count("RAY_AUTH_MODE=token") == 2
    assert "--dashboard-host=127.0.0.1" in text
    for command in [*filled["setup_commands"], *text.splitlines()]:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
    for local in config["file_mounts"].values():
        assert local.startswith("~/.ray/") or (ROOT / local).exists(), local


@pytest.mark.parametrize("name", ("aws", "gcp"))
def test_the_run_fits_into_the_rented_nodes(name):
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    kinds = config["available_node_types"].values()
    total = {
        resource: sum(kind["resources"].get(resource, 0) * kind.get("min_workers", 0) for kind in kinds)
        for resource in ("CPU", "GPU")
    }
    assert shortfalls(make_plan(load_config(ROOT / "configs" / "one_node.yaml", [], "ppo")), total) == []


# Slurm


def test_the_slurm_script_is_valid_and_leaves_no_forbidden_option():
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    text = script.read_text()
    # Options that symmetric-run refuses, and one `srun` for all nodes.
    assert not re.search(r"--(head|port|node-ip-address|block)\b", text)
    assert len(re.findall(r"^srun ", text, re.MULTILINE)) == 1
    assert "#SBATCH --signal=B:USR1@" in text
    assert "#SBATCH --requeue" in text


def test_the_slurm_script_asks_for_a_command():
    result = subprocess.run([CLUSTER / "slurm.sh"], capture_output=True, text=True, timeout=10)
    assert result.returncode == 2
    assert "ppo configs/one_node.yaml" in result.stderr


# Images


def instructions(name: str) -> list[tuple[str, str]]:
    text = (CLUSTER / name).read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout from the build: it lists exceptions to everything."""
    rules = [rule for rule in (ROOT / ".dockerignore").read_text().splitlines() if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    return not any(path.split("/")[0] == rule[1:] for rule in rules if rule.startswith("!"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_copy_what_is_there(name):
    steps = instructions(name)
    assert {word for word, _ in steps} <= {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    sources = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    # What the project's metadata needs, and what manifests name.
    assert {"pyproject.toml", "README.md", "LICENSE", "rlhf_ray", "configs"} <= set(sources)
    assert ("WORKDIR", IMAGE_FOLDER.rstrip("/")) in steps


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_install_requirements_first_and_run_without_rights(name):
    steps = instructions(name)
    requirements = next(i for i, (word, rest) in enumerate(steps) if word == "RUN" and "--no-deps" in rest)
    package = next(i for i, (word, rest) in enumerate(steps) if word == "COPY" and rest.split()[0] == "rlhf_ray")
    assert requirements < package
    (user,) = [rest for word, rest in steps if word == "USER"]
    pod = templates("rayjob")["head"]["spec"]["securityContext"]
    assert int(user) == pod["runAsUser"] == 1000
    for word, rest in steps:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, timeout=10)


def test_images_and_nodes_install_the_uv_of_the_checkout():
    (version,) = re.findall(r"^UV_VERSION=(\S+)$", (ROOT / "scripts" / "install.sh").read_text(), re.MULTILINE)
    for name in (*DOCKERFILES, "aws.yaml", "gcp.yaml"):
        assert re.findall(r"uv==(\S+)", (CLUSTER / name).read_text()) == [version], name


def test_the_cpu_image_has_the_locked_requirements_and_the_gpu_image_the_extra():
    cpu, gpu = ("\n".join(rest for _, rest in instructions(name)) for name in DOCKERFILES)
    assert "requirements/cpu.txt" in cpu
    assert "--torch-backend cpu" in cpu
    assert "--extra gpu" in gpu


# Grafana


def panels() -> list[dict[str, Any]]:
    return json.loads((CLUSTER / "grafana.json").read_text())["panels"]


def test_metric_names_are_those_that_prometheus_takes():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"rlhf_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert metric.tags == TAGS
        assert metric.description.endswith(".")


def test_the_dashboard_asks_for_known_metrics_only_and_shows_each():
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    known = {exported_name(name) for name in METRICS}
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    queries += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    asked = {name for query in queries for name in re.findall(rf"\b{RAY_PREFIX}\w+", query)}
    assert asked == known


def test_the_dashboard_filters_and_labels_by_tags():
    for panel in panels():
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert "rlhf_" in expression
            for selector in re.findall(r"\{([^}]*)\}", expression):
                assert set(re.findall(r"(\w+)(?:=~|=)", selector)) <= set(TAGS)
                assert 'run=~"$run"' in selector
            for tags in re.findall(r"by \(([^)]*)\)", expression):
                assert {tag.strip() for tag in tags.split(",")} <= set(TAGS)
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(TAGS)


def test_the_dashboard_shows_what_the_driver_counts_whatever_group_is_chosen():
    (iterations,) = [exported_name(name) for name, metric in METRICS.items() if "the driver" in metric.description]
    asked = [target["expr"] for panel in panels() for target in panel["targets"] if iterations in target["expr"]]
    assert len(asked) == 2
    assert not any("group" in expression for expression in asked)


def test_the_dashboard_knows_the_states():
    (timeline,) = [panel for panel in panels() if panel["type"] == "state-timeline"]
    (mapping,) = timeline["fieldConfig"]["defaults"]["mappings"]
    assert {int(value): shown["text"] for value, shown in mapping["options"].items()} == STATES


def test_counters_are_read_as_counters():
    """What restarts with its process is shown as a rate or as it is, never summed over time."""
    for panel in panels():
        for target in panel["targets"]:
            for name in re.findall(r"rate\((\w+)", target["expr"]):
                assert METRICS[name.removeprefix(RAY_PREFIX)].kind == "counter"
