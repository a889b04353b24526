#!/usr/bin/env bash
# torch 2.13.0: all_reduce with MAX over gloo finds a NaN of rank 0, and loses that of any other rank.
#
# A usual check for broken numbers reduces a loss or a gradient norm over the ranks by MAX: torch.max is NaN if any of
# its inputs is. gloo keeps its first argument unless the second one compares as larger, which a NaN never does.
#
# Expected: NaN, whichever rank has it. Actual: a NaN of rank 0 gives NaN. A NaN of another rank gives an ordinary
# number, and not even the largest one, since ranks after the NaN are lost with it: of 5, 6, NaN and 7 MAX is 6, and of
# 9, NaN, 6 and 7 MIN is 9. A test with one rank, or with the NaN in rank 0, shows nothing. Exits 0 while the behaviour
# is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"

cat >reduce.py <<'PYTHON'
import math
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NAN = math.nan
EXPECTED = {
    ("MAX", (NAN, 9, 6, 7)): NAN,
    ("MAX", (5, 6, NAN, 7)): 6,
    ("MAX", (3, 9, 7, NAN)): 9,
    ("MIN", (NAN, 9, 6, 7)): NAN,
    ("MIN", (9, NAN, 6, 7)): 9,
}


def work(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29515")
    dist.init_process_group("gloo", rank=rank, world_size=4)
    changed = False
    for (name, values), expected in EXPECTED.items():
        value = torch.tensor([float(values[rank])])
        dist.all_reduce(value, getattr(dist.ReduceOp, name))
        everywhere = [torch.empty(1) for _ in values]
        dist.all_gather(everywhere, value)
        results = [each.item() for each in everywhere]
        if rank == 0:
            print(f"{name} of {values} on four ranks:", results)
        changed |= any(str(result) != str(float(expected)) for result in results)
    dist.destroy_process_group()
    raise SystemExit(changed)


if __name__ == "__main__":
    mp.spawn(work, nprocs=4)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" reduce.py
