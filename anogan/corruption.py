"""Corruptions of the generator's input: it must not be able to copy what it is asked to rebuild."""
import torch
import torch.nn.functional as F

from anogan.errors import InputError

__all__ = ["coarse_noise"]


def coarse_noise(x,  # (B, C, H, W) images in [-1, 1]
                 std: float = 0.5,  # standard deviation of the noise, on the images' scale; 0 changes nothing
                 cells: int = 8,  # side of the coarse noise grid, in cells per image
                ):  # (B, C, H, W) images plus blotches of noise, not clipped
    "Add Gaussian noise drawn on a cells×cells grid and enlarged to the image (Kascenas et al. 2022, arXiv 2203.05563, Sec. 3)."
    if std < 0: raise InputError(f"the noise's standard deviation is {std}; use 0 or more")
    if std == 0: return x
    noise = torch.randn(x.shape[0], x.shape[1], cells, cells, device=x.device, dtype=x.dtype)
    return x + std * F.interpolate(noise, size=x.shape[-2:], mode="bilinear", align_corners=False)
