"""Fused kernels for Tiny Recursive Models. Needs torch alone; Triton is imported on first use."""

from trm_kernels.backends import BackendError, Selection, use_backend
from trm_kernels.config import NetworkConfig
from trm_kernels.network import TinyRecursiveNetwork, TransformerBlock
from trm_kernels.patch import PatchReport, patch
from trm_kernels.recursion import RecursionMixin, deep_recursion, latent_recursion

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "NetworkConfig",
    "PatchReport",
    "RecursionMixin",
    "Selection",
    "TinyRecursiveNetwork",
    "TransformerBlock",
    "deep_recursion",
    "latent_recursion",
    "patch",
    "use_backend",
]
