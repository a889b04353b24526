#!/usr/bin/env bash
# webdataset 1.0.2 silently skips tar members that are hard links.
#
# GNU tar stores a file whose inode it has already archived as a link to the earlier member, for example when identical
# images of a dataset were replaced by hard links to save space. Extracting the tar restores all files.
#
# Expected: two samples, each with jpg and txt. Actual: the second sample has only its txt, without a warning.
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2
cd "$folder"

printf 'the same image' > a.jpg
ln a.jpg b.jpg
printf 'first' > a.txt
printf 'second' > b.txt
tar -cf pairs.tar a.jpg a.txt b.jpg b.txt
mkdir extracted
tar -xf pairs.tar -C extracted
cmp a.jpg extracted/b.jpg

"$folder/venv/bin/python" - <<'PYTHON'
import webdataset

samples = list(webdataset.WebDataset("file:pairs.tar", shardshuffle=False))
found = [(sample["__key__"], "jpg" in sample, "txt" in sample) for sample in samples]
print(found)
raise SystemExit(found != [("a", True, True), ("b", False, True)])
PYTHON
