#!/usr/bin/env bash
# MLflow 3.17.2 changes the schema of a database that an older MLflow wrote as soon as a client looks at it.
#
# A database of MLflow 3.4.0 with a run in it is opened by a client of 3.17.2 that lists experiments and writes nothing.
#
# Expected: the refusal that MLflow has for this ("Detected out-of-date database schema … Take a backup of your database,
# then run 'mlflow db upgrade'"), and an unchanged file. What happens: since the newer version has tables that the
# older one lacks, it takes the database for a new one, creates "initial" tables and runs all migrations in place. MLflow
# 3.4.0, such as a colleague's or a server's, cannot open the file any more ("Can't locate revision identified by …").
# Exits 0 while that is so, 1 when the behaviour has changed.
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
