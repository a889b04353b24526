"""A CUDA device that computes nothing: a recipe's step at its real size, counted without a GPU.

Tensors have shapes, types, devices and lifetimes, but no values. So FLOPs, bytes and waits of the host can be counted,
and mistakes of devices and types show; numbers, races, NCCL, launch errors and times do not.

A process either has the device or not: `device.load` precedes the first import of torch. `check` starts such processes.
"""
