#!/usr/bin/env bash
# webdataset 1.0.2: what its own writer wrote, its reader gives back as fewer samples where keys hold a dot.
#
# TarWriter takes any key and writes KEY.EXTENSION. The reader ends a key at the first dot of the base name, so that
# photo.1 and photo.2 become one sample `photo` with the members 1.txt and 2.txt. Neither side says a word.
#
# Expected: two samples with the keys photo.1 and photo.2, or an error when the first is written.
# Exits 0 while they come back as one, 1 when the behaviour has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import webdataset

with webdataset.TarWriter("dots.tar") as writer:
    for number in (1, 2):
        writer.write({"__key__": f"photo.{number}", "txt": f"caption {number}"})
samples = list(webdataset.WebDataset("file:dots.tar", shardshuffle=False))
found = [(sample["__key__"], sorted(name for name in sample if name.endswith("txt"))) for sample in samples]
print(found)
raise SystemExit(found != [("photo", ["1.txt", "2.txt"])])
PYTHON
