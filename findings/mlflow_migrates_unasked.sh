#!/usr/bin/env bash
# MLflow 3.17.2 migrates the schema of a database written by an older MLflow as soon as a client reads from it.
#
# A client of 3.17.2 opens a database of MLflow 3.4.0 with one run, lists experiments and writes nothing.
#
# Expected: MLflow's error for this case ("Detected out-of-date database schema … Take a backup of your database,
# then run 'mlflow db upgrade'"), and an unchanged file. Actual: because the older schema lacks some tables of the newer
# version, MLflow treats the database as new, creates "initial" tables and runs all migrations in place. MLflow
# 3.4.0, such as a colleague's or a server's, can no longer open the file ("Can't locate revision identified by …").
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MLFLOW_DISABLE_TELEMETRY=true
python3 -m venv "$folder/old"
"$folder/old/bin/pip" install --quiet --disable-pip-version-check mlflow==3.4.0 sqlalchemy==2.0.43
python3 -m venv "$folder/new"
"$folder/new/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cd "$folder"

revision() {
    python3 -c 'import sqlite3; print(*sqlite3.connect("mlflow.db").execute("SELECT version_num FROM alembic_version").fetchone())'
}

list='from mlflow import MlflowClient; print(len(MlflowClient("sqlite:///mlflow.db").search_experiments()), "experiment")'
old/bin/python -c 'from mlflow import MlflowClient; MlflowClient("sqlite:///mlflow.db").create_run("0")'
old/bin/python -c "$list"
before=$(revision)
new/bin/python -c "$list"
after=$(revision)
echo "schema before: $before, after a look: $after"
[ "$before" != "$after" ] || exit 1
if old/bin/python -c "$list" 2> error; then exit 1; fi
tail -n 1 error
grep -q "Can't locate revision identified by '$after'" error
