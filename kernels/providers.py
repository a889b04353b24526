"""Choice of the implementation of each operation, by timing the candidates on the run's own device.

The fastest candidate depends on the GPU, the shape and the versions of the libraries, so each is timed at the run's
own shape before the first step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import attention
from .attention import Backend, PrefixLayout, Segments, prefix_attention, segment_attention
from .errors import first_line
from .latent_loss import Provider, patch_latent_loss, unavailable
from .runtime import triton

# In order of preference: the first three have the more accurate gradient. `triton-ws` is left out on purpose: its warp
# specialization compiles but is untested on hardware, and a wrong barrier hangs. It is used only on explicit request.
LOSS_CANDIDATES: tuple[Provider, ...] = ("triton-tma", "triton-tma-pair", "triton", "in-place", "reference")


@dataclass(frozen=True)
class Choice:
    """The chosen implementation of an operation in this run."""

    operation: str
    provider: str
    reason: str
    """One line for the log."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Median time of each candidate; empty when nothing was measured."""
    failed: dict[str, str] = field(default_factory=dict)
    """Candidates that failed, with the first line of their error."""


def median_milliseconds(call: Callable[[], object]) -> float:
    """Median time of `call` on the GPU, with the L2 cache flushed before every run."""
    return triton.testing.do_bench(call, return_mode="median")  # pyright: ignore[reportReturnType]


def fastest(
    operation: str,
    candidates: dict[str, Callable[[], object]],
    where: str,
    slack: float = 0.03,
    timer: Callable[[Callable[[], object]], float] = median_milliseconds,
) -> Choice:
    """The first of `candidates`, given in order of preference, within `slack` of the fastest.

    where: device, shape and dtype, for the reason. A candidate that raises is left out; RuntimeError if all raise.
    """
    milliseconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            milliseconds[name] = timer(call)
        except Exception as error:  # of the compiler, driver or allocator; the others may still run
            failed[name] = first_line(error)
    if not milliseconds:
        raise RuntimeError(f"{operation}: no candidate runs on {where}: {failed}")
    best = min(milliseconds.values())
    provider = next(name for name, took in milliseconds.items() if took <= best * (1 + slack))
    kind = "fastest" if milliseconds[provider] == best else f"preferred, within {slack:.0%} of the fastest,"
    times = ", ".join(f"{name} {took:.2f} ms" for name, took in sorted(milliseconds.items(), key=lambda item: item[1]))
    without = f"; failed: {', '.join(failed)}" if failed else ""
    return Choice(operation, provider, f"{kind} on {where}: {times}{without}", milliseconds, failed)


def choose_loss(tokens: int, width: int, latents: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Provider of `patch_latent_loss` for hidden states [tokens, width] and latents [tokens, latents].

    Times forward and backward with random data, on a GPU only. The choice may differ between ranks: a run that needs
    identical results on all ranks uses the choice of one rank.
    """
    operation = "patch_latent_loss"
    if device.type != "cuda":
        return Choice(operation, "reference", f"no kernel for {device.type}: plain PyTorch")
    where = f"{torch.cuda.get_device_name(device)} at {tokens} x {latents} {_short(dtype)}"
    with torch.cuda.device(device), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        choice = fastest(operation, _loss_steps(tokens, width, latents, dtype, device), where)
        torch.cuda.empty_cache()  # so that the run starts with unchanged memory
    return choice


def _loss_steps(
    tokens: int, width: int, latents: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Forward and backward with random data for every available provider."""
    draw = torch.Generator(device).manual_seed(0)  # does not advance the run's own generators

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    hidden, weight = normal(tokens, width).requires_grad_(), (normal(latents, width) * width**-0.5).requires_grad_()
    bias, target = normal(latents).requires_grad_(), normal(tokens, latents)
    token_weight = torch.ones(tokens, device=device)

    def step(provider: Provider) -> None:
        loss, _ = patch_latent_loss(hidden, weight, bias, target, token_weight, tokens, provider)
        torch.autograd.grad(loss, (hidden, weight, bias))

    ready: list[Provider] = [provider for provider in LOSS_CANDIDATES if unavailable(provider, device, dtype) is None]
    return {str(provider): functools.partial(step, provider) for provider in ready}


ATTENTION_CANDIDATES: tuple[Backend, ...] = ("varlen", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa")


def choose_attention(
    lengths: Sequence[int], patches: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Choice:
    """Backend of `prefix_attention` for texts of these `lengths` with `patches` patches each.

    heads: query heads, key heads, head width. Times the causal forward over text together with the forward and backward
    of the patches, on a GPU only.
    """
    operation = "prefix_attention"
    if device.type != "cuda":
        return Choice(operation, "sdpa", f"FlashAttention needs a GPU, this is {device.type}: torch's own attention")
    query_heads, key_heads, width = heads
    draw = torch.Generator(device).manual_seed(0)
    layout = PrefixLayout.of(lengths, patches, device)

    def normal(rows: int) -> list[Tensor]:
        counts = query_heads, key_heads, key_heads
        return [torch.randn(rows, n, width, generator=draw, device=device, dtype=dtype) for n in counts]

    texts, scale = layout.text, width**-0.5
    text_query, text_key, text_value = normal(texts.total)
    query, key, value = image = [x.requires_grad_() for x in normal(layout.image.total)]
    gradient = torch.ones_like(query)

    def step(backend: Backend) -> None:
        with torch.no_grad():
            segment_attention(text_query, text_key, text_value, texts, texts, True, scale, backend)
        out = prefix_attention(query, key, value, text_key, text_value, layout, scale, backend)
        torch.autograd.grad(out, image, gradient)

    ready: list[Backend] = [name for name in ATTENTION_CANDIDATES if attention.unavailable(name, device, dtype) is None]
    shape = f"{len(lengths)} x ({patches} patches, up to {texts.longest} text tokens) {_short(dtype)}"
    steps: dict[str, Callable[[], object]] = {str(name): functools.partial(step, name) for name in ready}
    with torch.cuda.device(device), torch.enable_grad():
        choice = fastest(operation, steps, f"{torch.cuda.get_device_name(device)} at {shape}")
        torch.cuda.empty_cache()
    return choice


def choose_vision_attention(
    segmentations: Sequence[tuple[Sequence[int], int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    asked: Backend | None = None,
) -> Choice:
    """Backend of `segment_attention` in a frozen vision encoder, whose heads may be of a width that a library that
    serves the language model does not support.

    segmentations: lengths of the segments of one layer, and in how many layers they occur: windows and whole images.
    heads: query heads, key heads, head width. Times their forward passes, on a GPU only. asked: used if it runs,
    else the others are timed.
    """
    operation = "vision_attention"
    if device.type != "cuda":
        return Choice(operation, asked or "sdpa", "set in the recipe" if asked else "FlashAttention needs a GPU")
    query_heads, key_heads, width = heads
    draw = torch.Generator(device).manual_seed(0)
    layers = [(Segments.of(lengths, device), count) for lengths, count in segmentations]

    def normal(count: int) -> Tensor:
        return torch.randn(layers[0][0].total, count, width, generator=draw, device=device, dtype=dtype)

    query, key, value = normal(query_heads), normal(key_heads), normal(key_heads)

    def forward(backend: Backend) -> None:
        for segments, count in layers:
            for _ in range(count):
                segment_attention(query, key, value, segments, segments, False, width**-0.5, backend)

    def among(names: Sequence[Backend]) -> Choice:
        steps: dict[str, Callable[[], object]] = {str(name): functools.partial(forward, name) for name in names}
        return fastest(operation, steps, f"{torch.cuda.get_device_name(device)} with heads of {width} {_short(dtype)}")

    ready: list[Backend] = [name for name in ATTENTION_CANDIDATES if attention.unavailable(name, device, dtype) is None]
    with torch.cuda.device(device), torch.no_grad():
        choice = asked_or_fastest(asked, ready, among)
        torch.cuda.empty_cache()
    return choice


def asked_or_fastest(
    asked: Backend | None, ready: Sequence[Backend], among: Callable[[Sequence[Backend]], Choice]
) -> Choice:
    """The choice `among` [asked]; among `ready` if nothing is asked, or if that fails, which the reason states."""
    if asked is None:
        return among(ready)
    try:
        return among([asked])
    except RuntimeError as error:
        choice = among([name for name in ready if name != asked])
        return dataclasses.replace(choice, reason=f"{asked} does not run ({error}); {choice.reason}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
