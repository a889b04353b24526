"""The model of stage 1, which predicts the latents of masked patches from the caption and the visible patches.

Legend: B samples of a micro-batch, K masks drawn per sample, N patches, T text tokens, S image side in pixels, H and W
height and width in an aspect-ratio bucket, D latent width.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import PatchLatentHead, PrefixLayout
from ...recipes.fields import HeldWeights
from ...recipes.schema import Branch
from ..models import weights
from ..models.backbone import FrozenBackbone, Prefix
from ..models.backbone_config import branch_layers, grid_side
from ..models.branch import GenerationBranch
from ..models.elementwise import use_liger
from ..models.flow_head import FlowHead
from ..models.image_grids import Grid
from ..models.kernel_selection import KernelChoice
from ..models.low_rank import share
from ..models.pixel_targets import EncodedTargets, LinearTargets, PixelTargets
from ..models.source_tokens import SourceTokens
from . import Losses, StageModel
from .branch_weights import copies, initial
from .unsharded import build_unsharded, set_unregistered_module


class PatchLatentModel(StageModel):
    """Frozen backbone, generation branch and head. `load` fills the weights after construction."""

    def __init__(
        self,
        config: Any,
        branch: Branch,
        image_size: int,
        activation_checkpointing: bool = False,
        kernels: KernelChoice = KernelChoice(),
        place: str = "sharded",
        vision: bool = True,
        held: HeldWeights = "bf16",
    ) -> None:
        """config: the backbone's Qwen2_5_VLConfig. image_size: S, in pixels. place: the backbone's placement. vision:
        whether the vision encoder is needed. held: how the text model holds its weights."""
        super().__init__()
        self.settings = branch
        self.masked_only = branch.loss_tokens == "masked"
        self.place = place
        self.attended = branch_layers(config, branch.layers)
        self.lora = branch.lora if branch.weights == "lora" else None
        self.build_backbone = partial(
            FrozenBackbone,
            config,
            kernels.attention,
            kernels.vision,
            vision=vision,
            held=held,
            attended=self.attended,
            differentiable=self.lora is not None,
        )
        if place == "sharded":
            self.backbone = self.build_backbone()
        self.branch = GenerationBranch(
            config.text_config,
            grid_side(config, image_size),
            branch.positions,
            activation_checkpointing,
            kernels.attention,
            fused=kernels.head != "reference",
            layers=len(self.attended),
            lora=self.lora,
        )
        if place == "sharded":
            self._share()
        width, patches = config.text_config.hidden_size, self.branch.side**2
        self.head: PatchLatentHead | FlowHead
        if branch.head == "flow":
            self.head = FlowHead(width, branch.flow_head, activation_checkpointing)
        else:
            self.head = PatchLatentHead(width, kernels.head)
        self.with_head = False
        self.targets: LinearTargets | None = None
        if branch.targets in ("pca", "random"):
            self.targets = PixelTargets(branch.targets, patches, 3 * image_size**2 // patches, width)
        self.liger = kernels.elementwise == "liger"
        if self.liger:
            use_liger(self)

    def use_targets(self, targets: EncodedTargets) -> None:
        """Let the branch predict these, whose encoder is placed as the backbone; before `load`."""
        self.targets = targets
        if self.place == "sharded":
            targets.encoder = targets.build()

    def measure_base_loss(self) -> None:
        """Give the backbone what `base_loss` needs; before `load`."""
        self.with_head = True
        if self.place == "sharded":
            self.backbone.add_head()

    def statistics(self) -> dict[str, Tensor]:
        parts = {"head": self.head, **({"targets": self.targets} if self.targets is not None else {})}
        return {
            f"{part}.{name}": buffer
            for part, module in parts.items()
            for name, buffer in module.named_buffers(recurse=False)  # not those of a frozen encoder
        }

    def load(self, files: weights.WeightFiles, seed: int) -> None:
        """Fill the backbone from `files`, copy to the branch what starts as a copy, initialise the rest."""
        self.build_rest()
        self.backbone.load(files)
        if isinstance(self.targets, EncodedTargets):
            self.targets.load()
        trainable = self.trainable()
        names = copies(trainable, self.settings, self.attended, self.backbone.names(files))
        weights.fill({theirs: trainable[name] for name, theirs in names.items()}, files, files.path)
        fresh = {name: parameter for name, parameter in trainable.items() if name not in names}
        std = self.branch.config.initializer_range
        drawn = {name: initial(name, weights.full_shape(parameter), std) for name, parameter in fresh.items()}
        weights.fill(fresh, weights.RandomInit(seed, drawn), "initial weights")

    def build_rest(self) -> None:
        """Build the backbone, without weights, if it is not sharded, and all rotary tables."""
        if self.place != "sharded":
            like = next(self.head.parameters())
            set_unregistered_module(self, "backbone", build_unsharded(self._build_backbone, self.place, like))
            if isinstance(self.targets, EncodedTargets):
                built = build_unsharded(self.targets.build, self.place, like)
                set_unregistered_module(self.targets, "encoder", built)
            if self.liger:
                use_liger(self.backbone)
            self._share()
        self.restore_rotary()

    def _build_backbone(self) -> FrozenBackbone:
        backbone = self.build_backbone()
        if self.with_head:
            backbone.add_head()
        return backbone

    def _share(self) -> None:
        """Let the branch use the text model's weights, with `branch.weights: lora`."""
        if self.lora is not None:
            share(self.branch.layers, [self.backbone.text.layers[index] for index in self.attended])

    def restore_rotary(self) -> None:
        """Rebuild rotary tables in fp32, whatever dtype the model was built in."""
        self.backbone.restore_rotary()
        self.branch.restore_rotary()
        if isinstance(self.targets, EncodedTargets):
            self.targets.restore()

    @torch.no_grad()
    def patch_latents(self, images: Tensor) -> Tensor:
        """What the branch predicts, [B, N, D], of uint8 images [B, 3, H, W]."""
        if self.targets is None:
            return self.backbone.patch_latents(images)
        return self.targets(images).to(next(self.head.parameters()).dtype)

    def forward(self, **batch: Any) -> Losses:
        """`base_loss` of a batch with `targets`, `image_loss` of others: ZeRO-3's hooks are those of this method."""
        return self.base_loss(**batch) if "targets" in batch else self.image_loss(**batch)

    @torch.no_grad()
    def base_loss(
        self,
        input_ids: Tensor,
        text_lengths: tuple[int, ...],
        rows: Tensor,
        targets: Tensor,
        images: Tensor | None = None,
        source_begins: tuple[int | None, ...] = (),
    ) -> Losses:
        """The frozen base's losses of the tokens `targets` after `rows`, int64 [R] each, of packed texts [sum T], with
        images [B, 3, S, S] uint8 in them; source_begins: see `SourceTokens.of`. `sums` are the summed loss and R."""
        placed = None
        if images is not None:
            latents = self.backbone.patch_latents(images)
            placed = SourceTokens.of(latents, text_lengths, source_begins, self.backbone.grid(images))
        layout = PrefixLayout.of(text_lengths, 0, input_ids.device)
        each = self.backbone.token_losses(input_ids, layout, rows, targets, placed).double()
        return Losses(each.sum(), torch.stack((each.sum(), each.new_tensor(float(len(each))))), each)

    def image_loss(
        self,
        input_ids: Tensor,
        text_lengths: tuple[int, ...],
        mask: Tensor,
        masked: Tensor,
        normalizer: float,
        images: Tensor | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        truncated: int = 0,
        grid: Grid | None = None,
        sources: Tensor | None = None,
        source_begins: tuple[int | None, ...] = (),
    ) -> Losses:
        """Losses of images [B, 3, H, W] uint8, or of their cached patch latents [B, N, D], with packed prompts [sum T],
        masked where mask [B K, N] is True. The masks of a sample, next to each other, share its latents and prefix.

        masked: int64 [R], the indices of the True entries among the B K N of `mask`, known without a device sync.
        normalizer: tokens of the mean; see `Stage.normalizer`. noise: of a flow head, `rng.states` of noise and noise
        levels, int64 [B, 2]. truncated: captions whose end was cut. grid: rows and columns of the N patches; None: the
        square. sources [E, 3, H, W] uint8: source images, in the order of the prompts that have one; source_begins: see
        `SourceTokens.of`.
        """
        edited = None
        if sources is not None:
            assert images is not None, "the cache has no latents of source images"
            # In one call: ranks without source images call the vision encoder as often, or ZeRO-3 would hang.
            both = self.patch_latents(torch.cat((images, sources)))
            latents, found = both[: len(images)], both[len(images) :]
            edited = SourceTokens.of(found, text_lengths, source_begins, self.backbone.grid(sources))
        elif images is not None:
            latents = self.patch_latents(images)
        assert latents is not None
        layout = PrefixLayout.of(text_lengths, mask.shape[1], mask.device, len(mask) // len(text_lengths))
        prefix = self.backbone.prefix(input_ids, layout, edited)
        found = self.losses(latents, mask, masked, prefix, normalizer, noise, grid)
        return found._replace(sums=torch.cat((found.sums, found.sums.new_full((1,), truncated))))

    def losses(
        self,
        latents: Tensor,
        mask: Tensor,
        masked: Tensor,
        prefix: Prefix,
        normalizer: float,
        noise: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Losses:
        """Losses of predicted against given latents [B, N, D]. `loss_tokens: masked` projects only the masked rows."""
        samples = len(latents)

        def head_loss(hidden: Tensor, target: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """rows [R]: numbers of the tokens, None for all of them."""
            if not isinstance(self.head, FlowHead):
                return self.head(hidden, target, None, normalizer)
            assert noise is not None
            tokens = mask.numel() // samples
            rows = torch.arange(mask.numel(), device=mask.device) if rows is None else rows
            return self.head.loss(hidden, target, normalizer, noise[rows // tokens], rows % tokens)

        if len(mask) > samples:
            latents = latents.repeat_interleave(len(mask) // samples, 0)
        target = latents.flatten(0, 1)
        if self.masked_only:
            loss, squares = head_loss(self.branch(latents, mask, prefix, masked, grid), target[masked], masked)
            error = squares.sum()
            squares = squares.new_zeros(mask.numel()).index_copy_(0, masked, squares)
        else:
            loss, squares = head_loss(self.branch(latents, mask, prefix, grid=grid).flatten(0, 1), target)
            error = squares[masked].sum()
        tokens = mask.numel() + prefix.layout.text.total
        sums = torch.stack((error, error.new_full((), len(masked)), error.new_full((), tokens)))
        return Losses(loss, sums, squares.view(samples, -1).sum(1) / normalizer)
