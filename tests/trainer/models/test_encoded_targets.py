"""VAE targets against diffusers' own VAE and patches that are cut out one by one; targets of another vision encoder."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_flux
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import FrozenBackbone, read_config
from bifrost.trainer.models.encoded_targets import EncoderTargets, VaeTargets
from bifrost.trainer.models.flux import FluxFolder
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles

SIDE, SIZE = 2, 32
IMAGES = torch.randint(0, 256, (6, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> FluxFolder:
    return FluxFolder.open(tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux")))


def fitted(folder: FluxFolder, width: int, size: int = SIZE) -> VaeTargets:
    targets = VaeTargets(folder, size, SIDE**2, width)
    targets.encoder = targets.build()
    targets.load()
    mean, basis = targets.fit([targets.values(IMAGES, torch.float64)], 0)
    targets.mean.copy_(mean)
    targets.basis.copy_(basis)
    return targets


@torch.no_grad()
def own_latents() -> np.ndarray:
    """[B, c, h, w] of the pipeline's VAE, (z - 0.2) 0.7, on 2 x 2 blocks of pixels as channels."""
    pixels = torch.nn.functional.pixel_unshuffle(IMAGES.float() / 127.5 - 1, 2)
    return ((tiny_flux.pipeline().vae.encode(pixels).latent_dist.mean - 0.2) * 0.7).double().numpy()


def test_values_are_the_latents_of_each_patch(folder: FluxFolder) -> None:
    latents, edge = own_latents(), 4
    assert latents.shape == (6, 4, 8, 8)
    found = fitted(folder, 7).values(IMAGES).numpy()
    for patch, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        cut = latents[:, :, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
        np.testing.assert_allclose(found[:, patch], cut.reshape(6, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [7, 100], ids=["fewer", "more"])
def test_targets_have_unit_variance_and_more_than_the_values_keep_all_of_them(folder: FluxFolder, width: int) -> None:
    targets = fitted(folder, width)
    found, values = targets(IMAGES).flatten(0, 1).double(), targets.values(IMAGES).flatten(0, 1).double()
    assert found.shape == (24, width) and bool((found.std(0) > 1e-3).all()), "no channel is padding"
    assert abs(float(found.var(0, correction=0).mean()) - 1) < 1e-3
    if width > values.shape[1] == 64:
        again = found @ torch.linalg.pinv(targets.basis.double().T) + targets.mean.double()
        torch.testing.assert_close(again, values, rtol=1e-4, atol=1e-4)
        scale = float(targets.basis.square().sum(0).mean()) ** 0.5
        torch.testing.assert_close(torch.cdist(found, found), scale * torch.cdist(values, values), rtol=1e-3, atol=1e-3)


def test_images_are_scaled_to_the_vaes_size(folder: FluxFolder) -> None:
    targets = fitted(folder, 7, size=16)
    scaled = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR) for x in IMAGES]
    small = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in scaled])
    torch.testing.assert_close(targets.values(IMAGES), targets.values(small), rtol=0.05, atol=0.05)


def test_sizes_whose_latents_do_not_divide_into_patches_are_refused(folder: FluxFolder) -> None:
    with pytest.raises(
        RunError, match=r"flux\.image_size=64: 16 x 16 VAE latents .* 3 x 3 patches; .* multiple of 24,"
    ):
        VaeTargets(folder, 64, 9, 7)


def test_targets_of_a_vision_encoder_are_rotations_of_its_latents() -> None:
    folder = locate("builtin:tiny")
    config, files = read_config(folder), WeightFiles(folder)
    images = torch.randint(0, 256, (3, 3, 112, 112), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    own = FrozenBackbone(config, text=False)
    own.load(files)
    latents = own.patch_latents(images).double()
    targets = EncoderTargets(config, files, 16, config.text_config.hidden_size)
    targets.encoder = targets.build()
    targets.load()
    mean, basis = targets.fit([targets.values(images[:2]), targets.values(images[2:])], 0)
    torch.testing.assert_close(mean, latents.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    targets.mean.copy_(mean)
    targets.basis.copy_(basis)
    found, scale = targets(images).double(), float(latents.flatten(0, 1).var(0, correction=0).mean()) ** -0.5
    torch.testing.assert_close(torch.cdist(found, found), scale * torch.cdist(latents, latents), rtol=1e-3, atol=1e-3)
