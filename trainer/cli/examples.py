"""One or two examples per command, shown at the end of its --help."""

from __future__ import annotations

import typer

RUNS = "--mllm runs/tiny-mllm --controlnet runs/tiny-controlnet"
EXAMPLES = {
    "train": ("bifrost train recipes/tiny-mllm.yaml --ranks 2", "bifrost train mllm-7b --ranks 64 --dry-run"),
    "resume": ("bifrost resume runs/tiny-mllm", "bifrost resume runs/tiny-mllm steps=800"),
    "init": ("bifrost init birds --from mllm-7b", "bifrost init sketch --from tiny-mllm"),
    "runs": ("bifrost runs", "bifrost runs runs"),
    "doctor": ("bifrost doctor", "bifrost doctor --folder runs --uri http://tracker:5000"),
    "generate": (f"bifrost generate {RUNS} --out images 'a red car and a blue heart' 'two owls'",),
    "eval": (
        f"bifrost eval {RUNS} --data 'demo/train-*.tar' --scenes demo/KEY.json --out runs/demo",
        f"bifrost eval {RUNS} --data 'single/train-*.tar' --out runs/single",
    ),
    "score": (
        "bifrost score generated --reference coco --size 256 --inception inception-2015-12-05.pt --clip clip-vit-b32",
        "bifrost score geneval --geneval results.jsonl --run runs/mllm-7b",
    ),
    "ablate": ("bifrost ablate tiny-mllm", "bifrost ablate mllm-3b --slurm '--nodes 4'"),
    "plan": (
        "bifrost plan mllm-7b --gpus 8,64 --device h200",
        "bifrost plan flux-controlnet --gpus 16 micro_batch=2",
        "bifrost plan mllm-3b --check --gpus 8",
    ),
    "goodput": ("bifrost goodput runs/tiny-mllm",),
    "report": ("bifrost report runs/tiny-mllm",),
    "compare": ("bifrost compare runs/tiny-mllm runs/faster",),
    "replay": ("bifrost replay runs/tiny-mllm --step 120",),
    "export": (
        "bifrost export runs/tiny-mllm exported --ema",
        "bifrost export runs/tiny-mllm pipeline --format pipeline --controlnet runs/tiny-controlnet",
    ),
    "hub push": ("bifrost hub push pipeline owner/name",),
    "hub pull": ("bifrost hub pull owner/name pipeline --revision v1",),
    "data demo": ("bifrost data demo demo", "bifrost data demo single --set drawings"),
    "data ingest": (
        "bifrost data ingest photos shards",
        "bifrost data ingest photos s3://bucket/shards",
        "bifrost data ingest photos shards --table captions.csv --caption-column text",
        "bifrost data ingest rooms shards --table edits.csv --source-column before",
    ),
    "data index": (
        "bifrost data index '/data/pairs/*.tar' --only-missing",
        "bifrost data index 's3://bucket/pairs/*.tar' --index-dir indexes",
        "srun --ntasks-per-node 8 bifrost data index '/data/pairs/*.tar'",
    ),
    "data verify": (
        "bifrost data verify '/data/pairs/{00000..00127}.tar'",
        "bifrost data verify '/data/pairs/*.tar' --ranks 8",
    ),
    "data catalogue": ("bifrost data catalogue /data/pairs",),
    "data stats": ("bifrost data stats 'demo/train-*.tar'",),
    "data encode": (
        "bifrost data encode mllm-7b backbone.vision_encoder=cached",
        "bifrost data encode flux-controlnet flux.placement.vae=cached",
    ),
    "checkpoint list": ("bifrost checkpoint list runs/tiny-mllm",),
    "checkpoint verify": ("bifrost checkpoint verify runs/tiny-mllm",),
    "checkpoint show": ("bifrost checkpoint show runs/tiny-mllm",),
    "checkpoint upload": ("bifrost checkpoint upload runs/mllm-7b --to s3://bucket/runs",),
    "checkpoint download": ("bifrost checkpoint download s3://bucket/runs/mllm-7b",),
    "bench step": (
        "bifrost bench step mllm-3b",
        "bifrost bench step flux-controlnet flux.image_size=256 data.image_size=224",
    ),
    "bench engine": (
        "bifrost bench engine tiny-mllm --random --steps 3",
        "bifrost bench engine mllm-3b --random --against-plan",
    ),
    "bench data": ("bifrost bench data 'demo/train-*.tar'",),
    "bench checkpoint": ("bifrost bench checkpoint --size 768MiB --rounds 3",),
    "bench scale": ("bifrost bench scale tiny-mllm",),
    "track sync": ("bifrost track sync runs/tiny-mllm",),
    "slurm devcluster": ("bifrost slurm devcluster up --nodes 2", "bifrost slurm devcluster down"),
    "slurm preflight": ("srun --ntasks-per-node 8 bifrost slurm preflight", "bifrost slurm preflight runs/mllm-7b"),
    "slurm render": ("bifrost slurm render mllm-7b --nodes 4 --gpus-per-node 8",),
    "slurm submit": (
        "bifrost slurm submit mllm-7b --nodes 4 data.shards='/data/pairs/*.tar'",
        "bifrost slurm submit mllm-7b --nodes 2-8 --time 1-00:00:00",
    ),
    "slurm submit-eval": (
        "bifrost slurm submit-eval runs/mllm-7b --every 1000 -- --controlnet runs/flux --data '/data/train-*.tar'",
    ),
    "slurm resume": ("bifrost slurm resume runs/mllm-7b",),
    "slurm status": ("bifrost slurm status runs/mllm-7b",),
    "slurm logs": ("bifrost slurm logs runs/mllm-7b --follow",),
    "slurm cancel": ("bifrost slurm cancel runs/mllm-7b",),
    "manifest": (
        "bifrost manifest mllm-7b --kind jobset --nodes 4",
        "bifrost manifest mllm-7b --kind skypilot --nodes 2",
    ),
    "kernels check": ("bifrost kernels check",),
    "kernels profile": ("bifrost kernels profile tiny-mllm --steps 3 --out profile",),
    "kernels bench": ("bifrost kernels bench --kernel all", "bifrost kernels bench --help"),
}
"""Command -> example command lines."""


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Have the help of every command in `app` end with its examples."""
    for info in app.registered_commands:
        name = info.name or (info.callback.__name__ if info.callback else "")
        if lines := EXAMPLES.get(f"{group}{name}"):
            # With blank lines between them: typer joins other lines into one paragraph.
            info.epilog = "\n\n".join(["For example:", *lines])
    for inner in app.registered_groups:
        if inner.typer_instance is not None and inner.name:
            add_examples(inner.typer_instance, f"{inner.name} ")
