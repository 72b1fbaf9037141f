"""A memory of normal images in the discriminator's features: what lies far from all of them is abnormal."""
import torch

from anogan.errors import InputError

__all__ = ["Memory"]


class Memory:
    "Features of normal training images, and the distance of other images to the nearest of them."
    def __init__(self,
                 features,  # (M, F) float16: one row per remembered image
                ):
        self.features = features

    @staticmethod
    @torch.no_grad()
    def features_of(discriminator,  # in eval mode
                    x,  # (B, C, H, W) images or reconstructions
                   ):  # (B, F): the discriminator's 8×8 map, flattened
        "What the discriminator sees at a resolution of 8×8 places, whatever the image's size."
        return discriminator.feature_maps(x)[-2].flatten(1)

    @classmethod
    def fit(cls,
            discriminator,  # in eval mode
            batches,  # iterable of (B, C, H, W) normal training images, on the discriminator's device
           ) -> "Memory":
        "Remember these images."
        if discriminator.training: raise InputError("the discriminator is in training mode, where features depend on the batch: call .eval() first")
        return cls(torch.cat([cls.features_of(discriminator, x).half() for x in batches]))

    def distance(self,
                 discriminator,  # the one the memory was made with
                 x,  # (B, C, H, W) images or reconstructions
                ):  # (B,), ≥ 0
        "Euclidean distance to the nearest remembered image, in double precision so that it does not depend on the batch."
        features, memory = self.features_of(discriminator, x).double(), self.features.double()
        return torch.cdist(features, memory).min(dim=1).values.float()
