"""Training-time augmentation in batches on the device, with parameters drawn for each image."""

import kornia.augmentation as K
from torch import nn


def hdkd() -> nn.Module:
    """HDKD's training transforms in their order [code]: (B, 3, H, W) float in [0, 1] to the same.

    Rotation by +-180 degrees (nearest, black fill), both flips with probability .5, brightness and contrast +-30 % (their order
    drawn once a batch), sharpness 2 with probability .5, and always a 3x3 Gaussian blur of sigma .1 to 2.
    """
    return nn.Sequential(
        K.RandomRotation(180.0, resample="nearest", p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        K.ColorJitter(brightness=0.3, contrast=0.3, p=1.0),
        K.RandomSharpness(sharpness=(2.0, 2.0), p=0.5),
        K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0),
    )


AUGMENTATIONS = {"none": nn.Identity, "hdkd": hdkd}
