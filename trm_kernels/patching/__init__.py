"""Search for networks and loops, and tests of their replacements, for :func:`trm_kernels.patch.patch`."""
