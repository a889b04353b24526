"""Models: the frozen backbone, the generation branch, prompts, masks, weights.

`hub`, `masking`, `rng` and the modules about configs import neither torch nor a model library: `bifrost plan` needs no
others.
"""
