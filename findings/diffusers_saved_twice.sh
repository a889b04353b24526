#!/usr/bin/env bash
# diffusers 0.42.1: a model folder saved in shards and then again as one file cannot be loaded.
#
# Expected: save_pretrained replaces the files of an earlier save_pretrained, so that from_pretrained reads the new weights.
# Actual: the second save removes the old shards, writes diffusion_pytorch_model.safetensors and keeps the old
# diffusion_pytorch_model.safetensors.index.json. from_pretrained reads that index first and raises FileNotFoundError for a
# shard that the library itself removed. (transformers also keeps its index, but reads model.safetensors first.)
#
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 safetensors==0.8.0

"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import os
import sys

from diffusers import AutoencoderKL

folder = sys.argv[1]
model = AutoencoderKL(block_out_channels=(32,))
model.save_pretrained(folder, max_shard_size="200KB")
print("saved in shards:", sorted(os.listdir(folder)))
model.save_pretrained(folder)
print("saved as one file:", sorted(os.listdir(folder)))
try:
    AutoencoderKL.from_pretrained(folder)
except FileNotFoundError as error:
    print("from_pretrained:", error)
else:
    sys.exit("changed: the folder loads")
PYTHON
