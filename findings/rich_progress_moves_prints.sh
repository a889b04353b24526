#!/usr/bin/env bash
# rich 15.0.0: a progress bar on standard error takes what the program prints away from standard output.
#
# The usual arrangement of a command whose result is piped: progress on standard error, which is a terminal, results by print()
# into a file (`command > result.txt`), the bar by Progress(console=Console(stderr=True)).
#
# Expected: the file has the result, the terminal the bar. Happens: while the bar is shown Progress redirects
# sys.stdout to its own console (redirect_stdout=True is the default, and is applied whenever that console is a
# terminal, whatever standard output is). The printed lines appear on the terminal and the file stays empty, with exit
# code 0. The remedy is redirect_stdout=sys.stdout.isatty().
#
# Exits 0 while this is so, 1 once it has changed.
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
