"""Imported once by the fork server, so that a test's rank starts in milliseconds."""

import gc

# Imported by the first `deepspeed.initialize`: torch's compiler, which takes most of the startup time.
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import bifrost.trainer.cli.main
import bifrost.trainer.stages.patch_latents
import bifrost.trainer.training.train  # noqa: F401
from bifrost.slurm import software

# Remembered per process: every rank compares them at startup.
software.all_versions()
software.source_digest()

# DeepSpeed runs the garbage collector at startup, which in a forked child would touch, and so copy, every page.
gc.freeze()
