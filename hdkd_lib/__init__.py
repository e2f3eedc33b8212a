"""Distilling CNNs into small vision transformers: the library under the study. Importing it registers its models with timm."""

from hdkd_lib import models  # noqa: F401

__version__ = "0.1.0"
