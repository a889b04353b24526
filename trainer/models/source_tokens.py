"""Source images of editing pairs within packed prompts, as Qwen2.5-VL itself reads an image in a user's message.

Legend: B prompts with T tokens each, E of them with a source image of N latents, D hidden width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import to_device


@dataclass(frozen=True)
class SourceTokens:
    """Latents of source images, and where they are. Token positions are Qwen's: an image's row and column count from
    the position where it begins, and the text behind it continues after the larger of both.

    latents [E, N, D]; rows int64 [E N]: rows of the packed prompts that hold them; positions int64 [3, sum T]: (t, h,
    w) of every token; after int64 [B]: position of the first token behind each prompt.
    """

    latents: Tensor
    rows: Tensor
    positions: Tensor
    after: Tensor

    @classmethod
    def of(
        cls, latents: Tensor, lengths: Sequence[int], begins: Sequence[int | None], grid: tuple[int, int]
    ) -> SourceTokens:
        """lengths: T of each prompt; begins: number of its first latent among its tokens, None without a source image;
        grid: rows and columns of an image."""
        cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T
        cells = torch.cat((torch.zeros_like(cells[:1]), cells))
        image = cells.shape[1]
        rows, positions, after, packed = [], [], [], 0
        for length, begin in zip(lengths, begins, strict=True):
            text = torch.arange(length).expand(3, -1)
            if begin is not None:
                behind = text[:, : length - begin - image] + begin + max(grid)
                text = torch.cat((text[:, :begin], cells + begin, behind), dim=1)
                rows.append(torch.arange(image) + packed + begin)
            positions.append(text)
            after.append(length if begin is None else length - image + max(grid))
            packed += length
        tables = torch.cat(rows), torch.cat(positions, dim=1), torch.tensor(after)
        return cls(latents, *(to_device(table, latents.device) for table in tables))
