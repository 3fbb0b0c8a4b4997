"""CUDA graphs of recursions: one per shape bucket, limited in number and memory, with reported fallbacks."""

from trm_kernels.graphs.buckets import Bucket, eighths, multiple_of, power_of_two
from trm_kernels.graphs.cache import GraphCache, GraphFallbackWarning, GraphStatus, graph_status
from trm_kernels.graphs.capture import Captured, CaptureError, Capturer, CudaCapturer, unavailable
from trm_kernels.graphs.function import GraphedFunction
from trm_kernels.graphs.recursion import GraphedRecursion, graphed

__all__ = [
    "Bucket",
    "CaptureError",
    "Captured",
    "Capturer",
    "CudaCapturer",
    "GraphCache",
    "GraphFallbackWarning",
    "GraphStatus",
    "GraphedFunction",
    "GraphedRecursion",
    "eighths",
    "graph_status",
    "graphed",
    "multiple_of",
    "power_of_two",
    "unavailable",
]
