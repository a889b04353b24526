"""The file for Prometheus: read by prometheus_client's parser, checked by the rules of its text format, never partial;
the dashboard queries only what is in it."""

import json
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bifrost.trainer.monitors.prometheus_file import PrometheusFile
from bifrost.trainer.monitors.tracking import start_mirror
from tracked import log_steps, wait_until

ROOT = Path(__file__).parents[3]
REAL = ROOT / "tests" / "fixtures" / "first_version"
LINE = re.compile(
    r'bifrost_[a-zA-Z0-9_]+\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\} (?:[-+]?[\d.]+(?:e[-+]?\d+)?|NaN|[-+]Inf)'
)


@pytest.fixture
def tracked_run(make_run, tmp_path):
    """(setting) -> a run with this place for the file, and the file."""

    def make(place=tmp_path / "collector"):
        (tmp_path / "collector").mkdir(exist_ok=True)
        run = make_run()
        recipe = f"name: demo\nstage: patch-latents\nsteps: 100\ntracking: {{prometheus: '{place}'}}\n"
        (run.folder / "recipe.yaml").write_text(recipe)
        (run.folder / "environment.json").write_text('{"ranks": 16}')
        return run

    return make


def samples(file):
    """(metric, labels without run and stage) -> value; asserts the rules that promtool checks."""
    text = file.read_text()
    assert text.endswith("\n")
    named = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in named), named
    assert len({line.rpartition(" ")[0] for line in named}) == len(named)
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    assert len({family.name for family in families}) == len(families)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        assert (labels.pop("run"), labels.pop("stage")) == ("demo", "patch-latents")
        found[(sample.name, *labels.values())] = sample.value
    return found


def test_the_latest_values_and_the_state(tracked_run, tmp_path):
    run, said = tracked_run(), []
    mirror = start_mirror(run.folder, ["prometheus"], said.append)
    run.metrics.write({"event": "start", "step": 0, "ranks": 16})
    log_steps(run, (10,))
    run.metrics.write({"event": "checkpoint", "step": 10, "seconds": 2.5})
    run.metrics.write({"event": "checkpoint", "step": 20, "seconds": 3.5})
    run.metrics.write({"step": 20, "loss": 0.25, "loss@a": float("nan"), "samples_per_s": 5, "time": 1700000000.5})
    file = tmp_path / "collector" / "bifrost-demo.prom"
    wait_until(lambda: file.exists() and samples(file)[("bifrost_run_step",)] == 20, 60)
    found = samples(file)
    assert str(found.pop(("bifrost_train_loss_a",))) == "nan"
    assert found == {
        ("bifrost_run_info", "16"): 1,
        ("bifrost_run_active",): 1,
        ("bifrost_run_step",): 20,
        ("bifrost_run_steps",): 100,
        ("bifrost_run_step_timestamp_seconds",): 1700000000.5,
        ("bifrost_events_total", "start"): 1,
        ("bifrost_events_total", "checkpoint"): 2,
        ("bifrost_start_ranks",): 16,
        ("bifrost_checkpoint_seconds",): 3.5,
        ("bifrost_train_samples",): 640,
        ("bifrost_train_loss",): 0.25,
        ("bifrost_perf_samples_per_s",): 5,
    }
    assert file.stat().st_mode & 0o777 == 0o644  # the node exporter runs as another user
    run.metrics.write({"event": "end", "step": 20, "outcome": "stopped"})
    assert mirror.finish(60)
    assert samples(file) == {
        ("bifrost_run_info", "16"): 1,
        ("bifrost_run_active",): 0,
        ("bifrost_run_step",): 20,
        ("bifrost_run_steps",): 100,
        ("bifrost_run_step_timestamp_seconds",): 1700000000.5,
        ("bifrost_run_outcome", "stopped"): 1,
    }
    assert f"Prometheus: {file}" in said


def test_a_resume_begins_again_and_may_name_a_file(tracked_run, tmp_path):
    file = tmp_path / "collector" / "mine.prom"
    run = tracked_run(file)
    log_steps(run, (10, 20, 30))
    run.metrics.write({"event": "rollback", "step": 30, "to": 10})
    target = PrometheusFile(run.folder, live=True)
    target.push(last=False)
    run.metrics.rewind(10)
    target.push(last=False)
    found = samples(file)
    assert found[("bifrost_run_step",)] == 10 and found[("bifrost_train_loss",)] == 0.1
    assert found[("bifrost_events_total", "rollback")] == 1
    target.end("failed")
    assert samples(file)[("bifrost_run_outcome", "failed")] == 1


def test_the_file_is_never_partial(tracked_run, tmp_path, monkeypatch):
    run = tracked_run()
    file = tmp_path / "collector" / "bifrost-demo.prom"
    target = PrometheusFile(run.folder, live=True)
    log_steps(run, (1,))
    target.push(last=False)
    complete, over, seen = len(samples(file)), threading.Event(), []

    def read():
        while not over.is_set():
            seen.append(samples(file))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 40):
        log_steps(run, (step,))
        target.push(last=False)
    over.set()
    reader.join()
    assert seen and {len(each) for each in seen} == {complete}
    before = file.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    log_steps(run, (50,))
    with pytest.raises(KeyboardInterrupt):
        target.push(last=False)
    assert file.read_text() == before and [each.name for each in file.parent.glob("*.prom")] == [file.name]


@pytest.mark.parametrize("how", ["missing", "full"])
def test_a_folder_that_cannot_be_written_is_reported_and_written_later(tracked_run, tmp_path, how):
    run, said = tracked_run(), []
    folder = tmp_path / "collector"
    if how == "missing":
        folder.rmdir()
    else:
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder]
        if (mounted := subprocess.run(command, capture_output=True)).returncode:
            pytest.skip(f"mounts need root: {mounted.stderr.decode().strip()}")
        (folder / "filler").write_bytes(bytes(4096))
    mirror = start_mirror(run.folder, ["prometheus"], said.append)
    begin = time.monotonic()
    log_steps(run, (10,))
    assert time.monotonic() - begin < 0.5
    wait_until(lambda: said, 60)
    reason = "No such file" if how == "missing" else "No space left on device"
    assert said[0].startswith("not sent to Prometheus, training continues: ") and reason in said[0]
    if how == "full":
        subprocess.run(["umount", "-l", folder], check=True)
    folder.mkdir(exist_ok=True)
    assert mirror.finish(60)
    assert samples(folder / "bifrost-demo.prom")[("bifrost_run_step",)] == 10


@pytest.mark.parametrize("stage", ["tiny-mllm", "tiny-controlnet"])
def test_the_dashboard_queries_what_is_in_the_file(tracked_run, tmp_path, stage):
    """Of a real run's metrics, and a validation, which those runs did not have."""
    run, file = tracked_run(), tmp_path / "collector" / "bifrost-demo.prom"
    (run.folder / "metrics.jsonl").write_bytes((REAL / stage / "metrics.jsonl").read_bytes())
    run.metrics.write({"step": 10**6, "val_loss": 1.0})
    target = PrometheusFile(run.folder, live=True)
    target.push(last=False)
    names = {name for name, *_ in samples(file)}
    target.end("failed")
    names |= {name for name, *_ in samples(file)}
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [str(each["query"]) for each in dashboard["templating"]["list"]]
    asked = {name for query in queries for name in re.findall(r"bifrost_\w+", query)}
    assert len(asked) > 20 and asked - names == set()
    assert all(set(re.findall(r"(\w+)=~", query)) <= {"run", "stage"} for query in queries)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
