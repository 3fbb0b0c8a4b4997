"""Models of other people, restated: what :func:`trm_kernels.patch` must recognise without importing it.

Each module keeps the parameter names, signatures and function of its origin and drops what the tests do
not need. None of it uses ``trm_kernels``, so they are also independent oracles of the reference.
"""
