"""The linear probe of patch latents, compared with a least-squares solver."""

import numpy as np
import torch

from bifrost.trainer.evaluation.pixel_probe import PENALTY, PixelProbe


def drawn(images: int, width: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of four patches per image, and images of noise."""
    draws = np.random.default_rng(0)
    latents = torch.from_numpy(draws.normal(size=(images, 4, width)) + 0.5).float()
    return latents, torch.from_numpy(draws.integers(0, 256, (images, 3, size, size), dtype=np.uint8))


def test_the_fit_is_the_regularised_least_squares_solution() -> None:
    latents, images = drawn(12, 5, 4)
    probe = PixelProbe(zip(latents.split(5), images.split(5), strict=True))
    rows, wanted = [], []
    for latent, image in zip(latents.double().numpy(), images.numpy() / 255.0, strict=True):
        for patch in range(4):
            top, left = 2 * (patch // 2), 2 * (patch % 2)
            rows.append([*latent[patch], 1])
            wanted.append(image[:, top : top + 2, left : left + 2].ravel())
    x = np.array(rows)
    # Ridge regression is least squares with one more row per penalised weight, which asks for a weight of 0.
    scale = np.sqrt(PENALTY * np.square(x[:, :5]).sum() / 5)
    x = np.vstack((x, np.hstack((scale * np.eye(5), np.zeros((5, 1))))))
    weights = np.linalg.lstsq(x, np.vstack((wanted, np.zeros((5, 12)))), rcond=None)[0]
    assert probe.weights.dtype == torch.float64
    np.testing.assert_allclose(probe.weights.numpy(), weights, rtol=0, atol=1e-12)


def test_pixels_that_are_linear_in_the_latents_are_found_in_their_places() -> None:
    _, images = drawn(160, 1, 6)
    draws = np.random.default_rng(1)
    mixing = np.linalg.qr(draws.normal(size=(30, 27)))[0].T
    tiles = [images[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] for row in (0, 1) for column in (0, 1)]
    latents = torch.from_numpy(np.stack([tile.flatten(1).numpy() @ mixing / 255 for tile in tiles], axis=1))
    probe = PixelProbe([(latents[:80], images[:80])])
    found = probe.images(latents[80:]).astype(int)
    assert np.abs(found - images[80:].permute(0, 2, 3, 1).numpy().astype(int)).max() <= 2
    assert probe.images(1e3 * latents[80:]).dtype == np.uint8
