#!/usr/bin/env bash
# DeepSpeed 0.19.8: within deepspeed.zero.Init with bf16, a tensor that is asked for in fp32 comes in bf16.
#
# ZeRO-3's context replaces torch's functions that make tensors, so that a model is built in the compute dtype. It casts
# what they return whatever dtype the call names, and not only parameters: positions of a rotary table, statistics,
# constants. fp64 and a later .float() are left alone.
#
# Expected: torch.arange(300, dtype=torch.float32) has fp32 and counts to 299. Actual: it has bf16, in which 257 is 256,
# so that tables of positions above 256 are wrong; torch.arange(300).float() is right. Exits 0 while the behaviour is
# reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 setuptools==80.9.0 \
  ninja==1.13.0
cd "$folder"

export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29512 DS_ACCELERATOR=cpu
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON'
import deepspeed
import torch

deepspeed.init_distributed("gloo", verbose=False)
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config):
    asked = torch.arange(300, dtype=torch.float32)
    cast = torch.arange(300).float()
print(f"arange(300, dtype=torch.float32): {asked.dtype}, element 257 is {asked[257].item():.0f}")
print(f"arange(300).float(): {cast.dtype}, element 257 is {cast[257].item():.0f}")
raise SystemExit((asked.dtype, asked[257].item(), cast[257].item()) != (torch.bfloat16, 256, 257))
PYTHON
