"""Pixel targets against numpy's singular values, and against patches that are cut out one by one."""

import numpy as np
import torch

from bifrost.trainer.models.pixel_targets import PixelTargets, patch_pixels

WIDTH, SIDE, PATCH = 8, 3, 4
VALUES = 3 * PATCH**2
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (60, 3, SIDE * PATCH, SIDE * PATCH), generator=DRAW, dtype=torch.uint8)
IMAGES[:, 0] //= 8  # directions of different variance


def rows() -> np.ndarray:
    cut = [
        image[:, y : y + PATCH, x : x + PATCH].reshape(-1) / 255
        for image in IMAGES.numpy()
        for y in range(0, SIDE * PATCH, PATCH)
        for x in range(0, SIDE * PATCH, PATCH)
    ]
    return np.stack(cut).astype(np.float64)


def fitted(kind, seed: int = 0, parts: int = 1) -> PixelTargets:
    targets = PixelTargets(kind, SIDE**2, VALUES, WIDTH)
    mean, basis = targets.fit([targets.values(part, torch.float64) for part in IMAGES.chunk(parts)], seed)
    targets.mean.copy_(mean)
    targets.basis.copy_(basis)
    return targets


def test_patches_are_in_raster_order() -> None:
    found = patch_pixels(IMAGES, SIDE**2, torch.float64).flatten(0, 1).numpy()
    np.testing.assert_array_equal(found, rows())


def test_principal_components_are_those_of_the_singular_values() -> None:
    centred = rows() - rows().mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    found = fitted("pca", parts=3)(IMAGES).flatten(0, 1).double().numpy()
    assert abs(found.mean(0)).max() < 1e-5 and abs(found.var(0).mean() - 1) < 1e-4
    wanted = values[:WIDTH] ** 2 / (values[:WIDTH] ** 2).mean()
    np.testing.assert_allclose(found.var(0), wanted, rtol=1e-4)
    cosine = np.linalg.norm(
        directions[:WIDTH] @ (fitted("pca").basis.T / fitted("pca").basis.norm(dim=1)).numpy(), axis=0
    )
    np.testing.assert_allclose(cosine, 1, rtol=1e-4)


def test_random_directions_are_orthonormal_and_depend_on_the_seed_alone() -> None:
    one, same, other = fitted("random", 1), fitted("random", 1, parts=4), fitted("random", 2)
    torch.testing.assert_close(one.basis, same.basis)
    assert not torch.allclose(one.basis, other.basis)
    gram = one.basis @ one.basis.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(WIDTH), rtol=1e-4, atol=1e-4)
    found = one(IMAGES)
    assert found.shape == (60, SIDE**2, WIDTH) and abs(float(found.var((0, 1)).mean()) - 1) < 1e-2


def test_buffers_stay_fp32_when_the_model_is_cast() -> None:
    assert fitted("pca").to(torch.bfloat16).basis.dtype == torch.float32
