"""PSNR and SSIM of images."""

import numpy as np
from scipy.ndimage import gaussian_filter

_BLUR = {"sigma": (1.5, 1.5, 0), "radius": (5, 5, 0)}  # windows of 11 x 11, as published


def psnr(real: np.ndarray, other: np.ndarray) -> float:
    """Decibels, the mean over frames uint8 [N, h, w, 3]."""
    square = ((real.astype(np.float64) - other) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(square, 1e-3))))


def ssim(real: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity, 1 where equal, the mean over frames uint8 [N, h, w, 3], over colours and over windows.

    Source: Wang et al., IEEE TIP 13(4), 2004, with its constants; windows that reach past the border do not count.
    """
    return float(np.mean([_ssim(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(real, other, strict=True)]))


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = gaussian_filter(a, **_BLUR), gaussian_filter(b, **_BLUR)
    variance_a = gaussian_filter(a * a, **_BLUR) - mean_a**2
    variance_b = gaussian_filter(b * b, **_BLUR) - mean_b**2
    covariance = gaussian_filter(a * b, **_BLUR) - mean_a * mean_b
    light, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + light) * (2 * covariance + contrast)
    likeness /= (mean_a**2 + mean_b**2 + light) * (variance_a + variance_b + contrast)
    border = _BLUR["radius"][0]
    return float(likeness[border:-border, border:-border].mean())
