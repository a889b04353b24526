#!/usr/bin/env bash
# webdataset 1.0.2: the reader returns fewer samples than the library's own writer wrote when keys contain a dot.
#
# TarWriter accepts any key and writes KEY.EXTENSION. The reader ends a key at the first dot of the base name, so that
# photo.1 and photo.2 become one sample `photo` with the members 1.txt and 2.txt. Neither prints a warning.
#
# Expected: two samples with the keys photo.1 and photo.2, or an error when the first is written.
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
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
