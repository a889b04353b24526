#!/usr/bin/env bash
# torch 2.13.0: the default stager of torch.distributed.checkpoint.async_save fails for DTensors that share memory.
#
# `async_save` copies the state with DefaultStager before it returns. Trainers often keep parameters or optimizer state as
# views of one flat buffer. Plain tensors that are views of one buffer are copied, and so are DTensors that have memory of
# their own.
#
# Expected: DTensors whose local tensors are views of one buffer are copied too, as `save` writes them. Actual:
# RuntimeError about an invalid storage. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import os

os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (1,))
flat = torch.arange(16.0)
plain = {"first": flat[:8], "second": flat[8:]}
placed = {name: DTensor.from_local(part, mesh, [Shard(0)], run_check=False) for name, part in plain.items()}
apart = {
    name: DTensor.from_local(part.clone(), mesh, [Shard(0)], run_check=False) for name, part in plain.items()
}


def staged(state):
    """`copied`, or the error of the stager that `async_save` uses by default, without its extra processes."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copies = stager.stage(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = all(
        torch.equal(*(each.to_local() if isinstance(each, DTensor) else each for each in (copies[name], state[name])))
        for name in state
    )
    return "copied" if same else "wrong values"


found = {"tensors that share memory": staged(plain), "DTensors with memory of their own": staged(apart)}
found["DTensors that share memory"] = staged(placed)
for what, outcome in found.items():
    print(f"{what}: {outcome}")
dist.destroy_process_group()
*others, shared = found.values()
raise SystemExit(others != ["copied", "copied"] or "RuntimeError" not in shared)
PYTHON
