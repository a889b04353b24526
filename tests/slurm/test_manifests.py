"""Manifests for Kubernetes and SkyPilot, compared with the models and schemas of their APIs, without a cluster."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import pods
from bifrost.recipes import load_recipe
from bifrost.slurm import SlurmError
from bifrost.slurm.exit_codes import BAD_NODE, HUNG, LOST, STOPPED, USAGE
from bifrost.slurm.manifests import kubernetes
from bifrost.trainer.cli.main import app

SITES = {
    "least": {"container": {"kind": "pyxis", "image": "registry.example.org#lab/bifrost:1"}},
    "most": {
        "container": {"kind": "apptainer", "image": "/shared/bifrost.sif", "mounts": ["/shared:/shared", "/data"]},
        "partition": "gpu",
        "modules": ["cuda/13.0"],
        "setup": ["ulimit -n 65536"],
        "environment": {"NOTE": "it's \"$WHO\"'s `id` \\ $(id)"},
        "fabric": {"interface": "eth0", "hca": "mlx5"},
        "scratch": "/local/$WHO",
        "kubernetes": {
            "namespace": "vision",
            "image": "lab/bifrost:1",
            "image_pull_secrets": ["registry"],
            "folder": "/shared/work",
            "claims": {"pairs": "/data", "runs": "/shared"},
            "secrets": ["mlflow"],
            "service_account": "trainer",
            "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H200"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
            "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
            "rdma": {"rdma/hca_shared_devices": 1},
            "memory_gib": 900,
            "queue": "gpus",
        },
        "skypilot": {
            "infra": "kubernetes",
            "accelerator": "H200",
            "use_spot": True,
            "image": "lab/bifrost:1",
            "folder": "/shared/work",
            "file_mounts": {"/data": "s3://pairs"},
            "volumes": {"/shared": "bifrost"},
            "secrets": ["MLFLOW_TRACKING_PASSWORD"],
        },
    },
}
CPU = ("--gpus-per-node", "0", "--tasks-per-node", "2")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "site.yaml"
    monkeypatch.setenv("BIFROST_SITE", str(file))
    file.write_text(yaml.safe_dump(SITES["most"]))
    return file


def same(model: Any, value: dict[str, Any]) -> None:
    """The API's model accepts `value` and knows each of its fields: it drops unknown ones, and adds defaults."""
    assert known(value, model.from_dict(value).to_dict()) == value


def known(value: Any, found: Any) -> Any:
    """`found` without the fields that `value` does not have."""
    if isinstance(value, dict) and isinstance(found, dict):
        return {name: known(value[name], each) for name, each in found.items() if name in value}
    if isinstance(value, list) and isinstance(found, list) and len(value) == len(found):
        return [known(each, other) for each, other in zip(value, found, strict=True)]
    return found


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("form", [("--nodes", "4"), CPU])
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_objects_are_those_of_kubernetes(kind: str, name: str, form: tuple[str, ...], site: Path) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    site.write_text(yaml.safe_dump(SITES[name]))
    config, job = pods.rendered(kind, "mllm-7b", *form)
    same(models.IoK8sApiCoreV1ConfigMap, config)
    for _, template in pods.templates([config, job]):
        same(models.IoK8sApiCoreV1PodTemplateSpec, template)
    if kind == "jobset":
        assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        same(models.JobsetV1alpha2JobSet, job)
        for each in job["spec"]["replicatedJobs"]:
            same(models.IoK8sApiBatchV1JobSpec, each["template"]["spec"])
    else:  # no package of a reasonable size has this one's model
        assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert job["spec"].keys() == {"runPolicy", "pytorchReplicaSpecs"}
        assert job["spec"]["runPolicy"] == {"cleanPodPolicy": "Running"}
        for each in job["spec"]["pytorchReplicaSpecs"].values():
            assert each.keys() == {"replicas", "restartPolicy", "template"} and each["restartPolicy"] == "ExitCode"
        count = 4 if form[0] == "--nodes" else 1
        replicas = {kind: each["replicas"] for kind, each in job["spec"]["pytorchReplicaSpecs"].items()}
        assert replicas == ({"Master": 1, "Worker": 3} if count == 4 else {"Master": 1})


def test_restarts_of_a_jobset_and_of_a_pytorchjob(site: Path) -> None:
    """A node's exit code is 0, 2 or the one that is started again (test_train_node.py)."""
    (*_, job) = pods.rendered("jobset", "mllm-7b", "--nodes", "4")
    (inner,) = (each["template"]["spec"] for each in job["spec"]["replicatedJobs"])
    fail, *ignored = inner["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [USAGE])
    assert [rule["action"] for rule in ignored] == ["Ignore", "Ignore"]
    assert ignored[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert ignored[1]["onExitCodes"]["values"] == [STOPPED]
    names = {rule["onExitCodes"]["containerName"] for rule in (fail, ignored[1])}
    assert names == {inner["template"]["spec"]["containers"][0]["name"]}
    # Kubernetes accepts a podFailurePolicy only with these.
    assert inner["template"]["spec"]["restartPolicy"] == "Never" and inner["podReplacementPolicy"] == "Failed"
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert inner["backoffLimit"] == 0 and job["spec"]["failurePolicy"]["maxRestarts"] == 10
    # The training operator: from 128 on, a pod is started again.
    assert kubernetes.AGAIN >= 128 > max(STOPPED, LOST, HUNG, BAD_NODE, USAGE)
    (config, *_) = pods.rendered("pytorchjob", "mllm-7b", "--nodes", "4")
    assert f"--again {kubernetes.AGAIN}" in config["data"]["node.sh"]


def test_pods_get_what_the_site_file_names(site: Path) -> None:
    config, job = pods.rendered("jobset", "mllm-7b", "--nodes", "4", "data.workers=4")
    ((_, template),) = pods.templates([config, job])
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": 48, "memory": "900Gi", "nvidia.com/gpu": 8, "rdma/hca_shared_devices": 1},
        "limits": {"memory": "900Gi", "nvidia.com/gpu": 8, "rdma/hca_shared_devices": 1},
    }
    volumes = {each["name"]: each for each in pod["volumes"]}
    places = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert places["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert places["/shared"]["persistentVolumeClaim"]["claimName"] == "runs"
    assert places["/data"]["persistentVolumeClaim"]["claimName"] == "pairs" and len(places) == len(volumes) == 4
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}] and "env" not in container
    assert container["workingDir"] == "/shared/work" and container["image"] == "lab/bifrost:1"
    assert pod["terminationGracePeriodSeconds"] == 600
    assert load_recipe_text(config["data"]["recipe.yaml"], site.parent) == load_recipe("mllm-7b", ["data.workers=4"])
    site.write_text(
        yaml.safe_dump(SITES["least"] | {"container": SITES["least"]["container"] | {"mounts": ["/a:/b:ro"]}})
    )
    ((_, template),) = pods.templates(pods.rendered("jobset", "mllm-7b", "--nodes", "4"))
    assert {"name": "data-0", "hostPath": {"path": "/a"}} in template["spec"]["volumes"]
    (container,) = template["spec"]["containers"]
    assert {"name": "data-0", "mountPath": "/b", "readOnly": True} in container["volumeMounts"]
    assert container["image"] == "registry.example.org/lab/bifrost:1" and "envFrom" not in container


def load_recipe_text(text: str, folder: Path) -> Any:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(str(folder / "recipe.yaml"))


def test_a_task_of_skypilot(site: Path) -> None:
    """By hand: the fields of SkyPilot 0.14.1 that are used. docs/kubernetes.md: its own schema has accepted them."""
    (task,) = pods.rendered("skypilot", "mllm-7b", "--nodes", "4", "data.workers=4")
    script = task.pop("run")
    assert task == {
        "name": "mllm-7b",
        "num_nodes": 4,
        "resources": {
            "infra": "kubernetes",
            "accelerators": "H200:8",
            "cpus": "48+",
            "use_spot": True,
            "image_id": "docker:lab/bifrost:1",
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [STOPPED]},
        },
        "file_mounts": {"/data": "s3://pairs"},
        "volumes": {"/shared": "bifrost"},
        "secrets": {"MLFLOW_TRACKING_PASSWORD": None},
    }
    assert script.startswith("cd /shared/work\n")
    site.write_text(yaml.safe_dump(SITES["least"]))
    (task,) = pods.rendered("skypilot", "tiny-mllm", *CPU)
    assert task.keys() == {"name", "num_nodes", "resources", "run"} and "accelerators" not in task["resources"]


@pytest.mark.parametrize("kind", pods.KINDS)
def test_skypilots_own_schema_accepts_its_tasks(kind: str, site: Path) -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="optional package skypilot is not installed")
    import jsonschema

    documents = pods.rendered(kind, "mllm-7b", "--nodes", "4")
    checks = [(documents[-1], schemas.get_task_schema())]
    checks.append((documents[-1].get("resources", {}), schemas.get_resources_schema()))
    problems = [
        error.message
        for value, schema in checks
        for error in jsonschema.Draft202012Validator(schema).iter_errors(value)
    ]
    assert (not problems) == (kind == "skypilot"), problems


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
@pytest.mark.parametrize("kind", pods.KINDS)
@pytest.mark.parametrize("name", SITES)
def test_scripts_are_clean(kind: str, name: str, site: Path) -> None:
    site.write_text(yaml.safe_dump(SITES[name] | {"skypilot": SITES["most"]["skypilot"]}))
    documents = pods.rendered(kind, "mllm-7b", "--nodes", "4")
    script = documents[0]["data"]["node.sh"] if kind != "skypilot" else "#!/bin/bash\n" + documents[0]["run"]
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert "module load" not in script and "/local" not in script


REFUSED = {
    "kubernetes.image": ({"container": {"kind": "apptainer", "image": "/shared/bifrost.sif"}}, "jobset"),
    "site file: /images/bifrost.sqsh is a file": (
        {"container": {"kind": "pyxis", "image": "/images/bifrost.sqsh"}},
        "jobset",
    ),
    "skypilot.accelerator": (SITES["least"], "skypilot"),
    "environment.HF_TOKEN contains a secret": ({"environment": {"HF_TOKEN": "hf_x"}}, "pytorchjob"),
    "environment.PROXY contains a secret": ({"environment": {"PROXY": "http://me:word@proxy:80"}}, "skypilot"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_sites_without_an_image_or_with_a_secret_are_refused(line: str, site: Path) -> None:
    settings, kind = REFUSED[line]
    site.write_text(yaml.safe_dump(settings))
    with pytest.raises(SlurmError, match=re.escape(line)) as refused:
        CliRunner().invoke(app, ["manifest", "mllm-7b", "--kind", kind], catch_exceptions=False)
    assert "hf_x" not in str(refused.value) and "word" not in str(refused.value)


def test_names_signatures_and_batches(site: Path) -> None:
    site.write_text(yaml.safe_dump(SITES["least"] | {"environment": {"TOKENIZERS_PARALLELISM": "false"}}))
    (*_, job) = pods.rendered("jobset", "mllm-7b", "name=My_Run.2")
    assert job["metadata"]["name"] == "my-run-2"
    (*_, job) = pods.rendered("jobset", "mllm-7b", "name=7b")
    assert job["metadata"]["name"] == "run-7b"
    for override, line in {
        f"name={'x' * 41}": "longer than 40 characters",
        "data.shards=https://example.org/a.tar?sig=AbC": "the recipe contains a secret",
    }.items():
        with pytest.raises(SlurmError, match=line):
            CliRunner().invoke(app, ["manifest", "mllm-7b", override], catch_exceptions=False)
    with pytest.raises(SlurmError, match="1024"):
        CliRunner().invoke(app, ["manifest", "mllm-7b", "--nodes", "3"], catch_exceptions=False)
