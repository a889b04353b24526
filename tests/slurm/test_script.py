"""Batch scripts and site files, without a cluster."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bifrost.slurm import SlurmError
from bifrost.slurm.cli import slurm_app
from bifrost.slurm.exit_record import grace
from bifrost.slurm.job import parse_nodes, seconds, usable_nodes
from bifrost.slurm.manifests.settings import Kubernetes, SkyPilot
from bifrost.slurm.site import Container, Fabric, Site, load_site

SITES = {
    "bare": {},
    "modules": {
        "partition": "gpu",
        "account": "lab",
        "time": "1-00:00:00",
        "cpus_per_task": 12,
        "sbatch": ["--qos=high"],
        "modules": ["cuda/13.0", "python/3.11"],
        "setup": ["ulimit -n 65536"],
        "environment": {"NOTE": "it's \"$WHO\"'s `id` \\ $(id)"},
        "fabric": {"interface": "ib0", "hca": "mlx5"},
        "scratch": "/local/$WHO",
        "preflight": False,
        "requeue": False,
    },
    "pyxis": {"container": {"kind": "pyxis", "image": "lab/bifrost:1", "mounts": ["/data:/data", "/runs:/runs"]}},
    "apptainer": {"container": {"kind": "apptainer", "image": "bifrost.sif", "mounts": ["/data"]}},
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text("")
    monkeypatch.setenv("BIFROST_SITE", str(file))
    return file


def rendered(*arguments: str) -> str:
    ended = CliRunner().invoke(slurm_app, ["render", *arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize(
    "form", [("--nodes", "2-4"), ("--gpus-per-node", "0", "--tasks-per-node", "2", "--array", "1-5%1")]
)
def test_scripts_are_short_and_clean(site: Path, name: str, form: tuple[str, ...]) -> None:
    site.write_text(yaml.safe_dump(SITES[name]))
    script = rendered("mllm-7b", *form, "name=a-run")
    assert len(script.splitlines()) < 60
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_options_and_exports_of_a_script(site: Path) -> None:
    site.write_text(yaml.safe_dump(SITES["modules"]))
    script = rendered(
        "mllm-7b", "--nodes", "4", "--gpus-per-node", "8", "--time", "8:00:00", "--exclude", "gpu[1-3],gpu9"
    )
    options = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--partition=gpu",
        "--account=lab",
        "--time=8:00:00",
        "--exclude='gpu[1-3],gpu9'",
        "--signal=USR1@120",
        "--open-mode=append",
        "--no-requeue",
        "--qos=high",
    } <= options
    assert "--ntasks-per-node=8 --cpus-per-task=12)" in script
    assert "preflight" not in script and "--kill-on-bad-exit=1" in script
    # The shell expands the variables as intended.
    exports = "\n".join(
        line for line in script.splitlines() if line.startswith("export") and not re.search(r"\$run|\$port", line)
    )
    shell = f'WHO=me\n{exports}\necho "$NOTE $NCCL_SOCKET_IFNAME $NCCL_IB_HCA $BIFROST_SCRATCH"'
    out = subprocess.run(["bash", "-uc", shell], capture_output=True, text=True, check=True)
    assert out.stdout == "it's \"me\"'s `id` \\ $(id) ib0 mlx5 /local/me\n"


def test_cores_follow_the_workers(site: Path) -> None:
    site.write_text("{}")
    script = rendered("mllm-7b", "--nodes", "4", "--gpus-per-node", "8", "data.workers=5")
    assert "#SBATCH --cpus-per-task=56\n" in script, "per rank: main thread, communication, workers"
    assert "--ntasks-per-node=8 --cpus-per-task=7" in script


def test_containers(site: Path) -> None:
    site.write_text(yaml.safe_dump(SITES["pyxis"]))
    pyxis = rendered("mllm-7b")
    assert "--container-image=lab/bifrost:1 '--container-mounts=/data:/data,/runs:/runs'" in pyxis
    assert "bifrost=(python3 -m bifrost.trainer)" in pyxis
    site.write_text(yaml.safe_dump(SITES["apptainer"]))
    assert "(apptainer exec --nv --bind /data bifrost.sif python3 -m bifrost.trainer)" in rendered("mllm-7b")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"particion": "gpu"}, "unknown key particion; did you mean partition"),
        ({"container": {"kind": "pyxis", "imag": "x", "image": "y"}}, r"unknown key container\.imag; did you mean"),
        ({"bad_node_threshold": 0}, "bad_node_threshold: "),
        ({"requeue": "yes"}, r"requeue: input should be a valid boolean \(got 'yes'\)"),
    ],
)
def test_an_invalid_site_file_is_refused(site: Path, settings: dict, problem: str) -> None:
    site.write_text(yaml.safe_dump(settings))
    with pytest.raises(SlurmError, match=rf"site\.yaml: {problem}"):
        load_site()


def test_limits_in_common_notations(site: Path) -> None:
    site.write_text("preflight_limits: {slow: 2e-1, free_gib: 100}")
    assert load_site().preflight_limits == {"slow": 0.2, "free_gib": 100}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes", "3-2"], "--nodes 3-2: the minimum"),
        (["--nodes", "two"], "--nodes two: give a number"),
        (["--gpus-per-node", "0"], "needs --tasks-per-node"),
        (["--tasks-per-node", "3"], "one task per GPU"),
        (["--array", "1-10"], "end it with %1"),
        (["--time", "2"], "time limit 2: 120 s are reserved"),
        (["--time", "soon"], "time limit soon: use minutes"),
        (["--nodes", "3", "global_batch=64", "micro_batch=1"], "does not divide .* or choose other --nodes"),
    ],
)
def test_an_invalid_request_is_refused(site: Path, arguments: list[str], problem: str) -> None:
    with pytest.raises(SlurmError, match=problem):
        CliRunner().invoke(slurm_app, ["submit", "mllm-7b", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--gpus-per-task=1", "--gpu-bind=single:1", "--tres-per-task=cpu=4,gres/gpu=1"])
def test_a_site_that_binds_gpus_to_tasks_is_refused(site: Path, option: str) -> None:
    site.write_text(yaml.safe_dump({"sbatch": ["--qos=high", option]}))
    with pytest.raises(SlurmError, match=f"site file: sbatch: {option}: each task must see all GPUs"):
        CliRunner().invoke(slurm_app, ["render", "mllm-7b"], catch_exceptions=False)


def test_docs_list_every_site_setting() -> None:
    rows = {}
    for page in ("slurm.md", "kubernetes.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8").split("| site file |")[1]
        rows |= dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text.split("\n\n")[0], flags=re.M))
    groups = {"container": Container, "fabric": Fabric, "kubernetes": Kubernetes, "skypilot": SkyPilot}
    fields = {name: field for name, field in Site.model_fields.items() if name not in groups}
    for group, model in groups.items():
        fields |= {f"{group}.{name}": field for name, field in model.model_fields.items()}
    assert rows == {name: field.description for name, field in fields.items()}


def test_largest_number_of_nodes_that_divides_the_batch() -> None:
    assert [usable_nodes(96, 1, 8, (1, most)) for most in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 4, 4, 6]
    with pytest.raises(SlurmError, match="does not divide"):
        usable_nodes(96, 1, 8, (5, 5))
    assert parse_nodes("4") == (4, 4) and parse_nodes("2-8") == (2, 8)


def test_time_limits_in_slurms_notation() -> None:
    cases = {"5": 300, "5:30": 330, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200, "1-0:0:10": 86410}
    assert {text: seconds(text) for text in cases} == cases


def test_grace_is_twice_a_step_and_a_save(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert grace(tmp_path) == 120, "nothing measured"
    step, save = '{{"step": 1, "step_s": {}}}\n', '{{"event": "checkpoint", "step": 1, "seconds": {}}}\n'
    metrics.write_text(step.format(9.0) * 3 + save.format(30.0) + save.format(50.0) + step.format(11.0) + '{"torn')
    assert grace(tmp_path) == 2 * (9 + 50)
    metrics.write_text(step.format(0.2) + save.format(0.5))
    assert grace(tmp_path) == 60, "minimum, for Slurm's timer"
