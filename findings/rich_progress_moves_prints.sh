#!/usr/bin/env bash
# rich 15.0.0: a progress bar on standard error diverts printed output from standard output.
#
# A typical command whose output is redirected: a progress bar on standard error, which is a terminal, by
# Progress(console=Console(stderr=True)), and results written to a file by print() (`command > result.txt`).
#
# Expected: the result is in the file and the bar on the terminal. Actual: while the bar is shown, Progress redirects
# sys.stdout to its own console (redirect_stdout=True is the default, and applies whenever that console is a
# terminal, regardless of standard output). The printed lines appear on the terminal and the file stays empty, with exit
# code 0. Workaround: redirect_stdout=sys.stdout.isatty().
#
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rich==15.0.0

cat > "$folder/command.py" <<'PYTHON'
from rich.console import Console
from rich.progress import Progress

with Progress(console=Console(stderr=True)) as progress:
    task = progress.add_task("working", total=2)
    for number in range(2):
        print("result", number)
        progress.advance(task)
PYTHON

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import pty
import subprocess
import sys

folder = sys.argv[1]
ours, terminal = pty.openpty()
with open(f"{folder}/result.txt", "w") as result:
    ended = subprocess.run([sys.executable, f"{folder}/command.py"], stdout=result, stderr=terminal)
os.close(terminal)
seen = b""
while True:
    try:
        block = os.read(ours, 4096)
    except OSError:  # nothing is left
        break
    if not block:
        break
    seen += block
written = open(f"{folder}/result.txt").read()
print("exit code", ended.returncode)
print("in the file:", repr(written))
print("on the terminal:", [line for line in seen.decode().splitlines() if "result" in line])
if written or b"result 1" not in seen:
    sys.exit("changed: the results are in the file")
PYTHON
