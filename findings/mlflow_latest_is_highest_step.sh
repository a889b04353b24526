#!/usr/bin/env bash
# MLflow 3.17.2: a run's current metrics are those of the highest step, not those logged last.
#
# A training is rolled back from step 100 to step 50 and continues. Until it reaches step 100 again, the run's metrics,
# the table of runs, and searches with conditions or an order show the value of the attempt that was discarded. Within
# a step the later timestamp wins, and at equal timestamps the larger value: for a loss the worse one.
#
# Expected, as documented for RunData.metrics: for each key the value with the latest timestamp. Actual: the value of
# step 100, logged earlier. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MLFLOW_DISABLE_TELEMETRY=true
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
from mlflow import MlflowClient
from mlflow.entities import RunData

client = MlflowClient("sqlite:///mlflow.db")
run = client.create_run("0").info.run_id
client.log_metric(run, "loss", 9.0, timestamp=1000, step=100)
client.log_metric(run, "loss", 1.0, timestamp=2000, step=51)
client.log_metric(run, "twice", 5.0, timestamp=3000, step=1)
client.log_metric(run, "twice", 3.0, timestamp=3000, step=1)

shown = client.get_run(run).data.metrics
better = client.search_runs(["0"], "metrics.loss < 2")
documented = "latest timestamp" in RunData.metrics.__doc__
print("documented as the latest timestamp:", documented)
print("loss 9.0 of step 100, then 1.0 of step 51; shown:", shown["loss"], "found by loss < 2:", len(better))
print("5.0, then 3.0 at the same step and time; shown:", shown["twice"])
raise SystemExit(not (documented and shown == {"loss": 9.0, "twice": 5.0} and not better))
PYTHON
