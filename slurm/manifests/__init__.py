"""Manifests of runs for clusters without Slurm: a JobSet or a PyTorchJob for Kubernetes, a task for SkyPilot.

They are rendered from the site file and recipe that `bifrost slurm submit` uses; the user applies them.
"""
