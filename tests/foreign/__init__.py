"""Reimplementations of third-party models, which :func:`trm_kernels.patch` must recognise without imports.

Each module keeps the parameter names, signatures and function of the original, and omits what the tests do
not need. None of them uses ``trm_kernels``, so they are also independent oracles of the reference.
"""
