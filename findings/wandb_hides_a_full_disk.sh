#!/usr/bin/env bash
# wandb 0.31.0: rows of an offline run that a full disk refuses are lost without an error.
#
# On a disk of 128 KB, 3,000 rows are logged. Every call returns, `finish` too, and the run counts as finished; only
# its logs/debug-internal.log, on the same disk, has "no space left on device".
#
# Expected: an exception of `log` or `finish`, or a message. Actual: none, and a few hundred rows are stored. Needs
# root or user namespaces, for the mount. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export WANDB_ERROR_REPORTING=false
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
mkdir "$folder/disk"

cat >"$folder/log.py" <<'PYTHON'
import subprocess
import sys

import wandb

run = wandb.init(mode="offline", dir=sys.argv[1], settings=wandb.Settings(console="off", x_disable_stats=True))
for step in range(3000):
    run.log({"loss": 1.0 / (step + 1)})
run.finish()
reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", f"{sys.argv[1]}/wandb"]
stored = subprocess.run(reader, capture_output=True, text=True).stdout.count('"type":"history"')
print("logged 3000 rows without an error, stored:", stored)
raise SystemExit(stored >= 3000)
PYTHON
# shellcheck disable=SC2016
unshare --map-root-user --mount bash -c \
  'mount -t tmpfs -o size=128k tmpfs "$0/disk" && "$0/venv/bin/python" "$0/log.py" "$0/disk"' "$folder"
