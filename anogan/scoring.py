"""From two networks to a number and a map per image: reconstruction error, latent distance, and how they are joined."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from anogan.errors import InputError

__all__ = ["error_map", "reconstruction_error", "latent_distance", "score_terms", "join_terms", "Calibration", "smooth"]


def error_map(x,  # (B, C, H, W) images in [-1, 1]
              fake,  # (B, C, H, W) reconstructions
             ):  # (B, H, W), ≥ 0
    "Squared error of every pixel, averaged over the channels."
    return (x - fake).square().mean(dim=1)


def reconstruction_error(x,  # (B, C, H, W) images in [-1, 1]
                         fake,  # (B, C, H, W) reconstructions
                        ):  # (B,), ≥ 0
    "Mean squared error of each image: the `rec` of the published score."
    return error_map(x, fake).mean(dim=(1, 2))


def latent_distance(real_features,  # (B, nz) discriminator features of the images
                    fake_features,  # (B, nz) discriminator features of the reconstructions
                   ):  # (B,), ≥ 0
    "Mean squared distance of each pair of features: the `lat` of the published score."
    return (real_features - fake_features).square().mean(dim=1)


@torch.no_grad()
def score_terms(generator,  # (B, C, H, W) to (B, C, H, W), in eval mode
                discriminator,  # (B, C, H, W) to (logits (B,), features (B, nz)), in eval mode
                x,  # (B, C, H, W) images in [-1, 1]
               ):  # dict of (B,) tensors: rec and lat
    "Both terms of the score, for a batch; networks in training mode are refused, for their BatchNorm would mix the images."
    if generator.training or discriminator.training:
        raise InputError("the networks are in training mode, where a score depends on the other images of its batch: call .eval() first")
    fake = generator(x)
    return dict(rec=reconstruction_error(x, fake), lat=latent_distance(discriminator(x)[1], discriminator(fake)[1]))


def join_terms(terms: dict,  # rec and lat, (N,) each
               rec_weight: float = 0.9,  # weight of rec; lat has the rest
              ):  # (N,) score, higher = more abnormal
    "Weighted sum of the two terms (Skip-GANomaly, arXiv 1901.08954, Sec. 3.3)."
    return rec_weight * terms["rec"] + (1 - rec_weight) * terms["lat"]


@dataclass
class Calibration:
    "Mean and standard deviation of each term on normal validation images, so that the terms can be added on one scale."
    mean: dict  # term -> mean
    sd: dict  # term -> standard deviation, > 0

    @classmethod
    def fit(cls,
            terms: dict,  # term -> (N,) values of normal validation images
           ) -> "Calibration":
        "Measure; a constant term gets a standard deviation of 1."
        sd = {name: float(t.double().std()) if len(t) > 1 else 0.0 for name, t in terms.items()}
        return cls({name: float(t.double().mean()) for name, t in terms.items()}, {name: v or 1.0 for name, v in sd.items()})

    def __call__(self,
                 terms: dict,  # term -> (N,) values
                ) -> dict:  # term -> (N,) values, 0 ± 1 on normal images
        "z-normalise."
        return {name: (t - self.mean[name]) / self.sd[name] for name, t in terms.items()}


def smooth(maps,  # (N, H, W)
           sigma: float,  # standard deviation of the Gaussian, pixels; 0 changes nothing
          ):  # (N, H, W)
    "Blur maps a little: a defect is rarely one pixel, and noise often is."
    if sigma == 0: return maps
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / sigma).square())
    weights = weights / weights.sum()
    maps = F.pad(maps[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(maps, weights[None, None, :, None]), weights[None, None, None, :])[:, 0]
