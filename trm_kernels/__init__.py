"""Fused kernels for Tiny Recursive Models. Only torch is required; Triton is imported on first use."""

from trm_kernels.backends import BackendError, Selection, use_backend
from trm_kernels.carry import Carry
from trm_kernels.config import NetworkConfig
from trm_kernels.graphs import GraphCache, GraphedFunction, GraphedRecursion, graph_status, graphed
from trm_kernels.halting import AsyncCount, HaltingResult, halting_recursion
from trm_kernels.network import TinyRecursiveNetwork, TransformerBlock
from trm_kernels.optim.adam_atan2 import AdamATan2
from trm_kernels.optim.averaging import ParameterAverage
from trm_kernels.optim.capturable import capturable_adam_atan2, capturable_adamw
from trm_kernels.optim.sparse_embedding import JointOptimizer, SparseEmbedding, SparseSignSGD
from trm_kernels.packing import Packing
from trm_kernels.patch import PatchReport, patch
from trm_kernels.prepared import FrozenError, frozen
from trm_kernels.recursion import RecursionMixin, deep_recursion, latent_recursion
from trm_kernels.training import TrainingStep

__version__ = "0.1.0"

__all__ = [
    "AdamATan2",
    "AsyncCount",
    "BackendError",
    "Carry",
    "FrozenError",
    "GraphCache",
    "GraphedFunction",
    "GraphedRecursion",
    "HaltingResult",
    "JointOptimizer",
    "NetworkConfig",
    "Packing",
    "ParameterAverage",
    "PatchReport",
    "RecursionMixin",
    "Selection",
    "SparseEmbedding",
    "SparseSignSGD",
    "TinyRecursiveNetwork",
    "TrainingStep",
    "TransformerBlock",
    "capturable_adam_atan2",
    "capturable_adamw",
    "deep_recursion",
    "frozen",
    "graph_status",
    "graphed",
    "halting_recursion",
    "latent_recursion",
    "patch",
    "use_backend",
]
