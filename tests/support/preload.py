"""Imported once by the fork server, so that a rank of a test starts in milliseconds."""

import gc

# What `deepspeed.initialize` imports when it is first called: torch's compiler, most of a start's time.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import bifrost.trainer.cli.main
import bifrost.trainer.stages.patch_latents
import bifrost.trainer.training.train  # noqa: F401

# DeepSpeed collects garbage while it starts: in a forked child that would touch, and so copy, every page of these.
gc.freeze()
