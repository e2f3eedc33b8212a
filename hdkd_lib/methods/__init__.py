"""Training methods, one file per paper; each is a `timm.task.TrainingTask`."""

from hdkd_lib.methods.cskd import CSKD
from hdkd_lib.methods.dearkd import DearKD
from hdkd_lib.methods.deit import DeiT
from hdkd_lib.methods.hdkd import HDKD
from hdkd_lib.methods.supervised import Supervised

__all__ = ["CSKD", "HDKD", "DearKD", "DeiT", "Supervised"]
