"""How :func:`trm_kernels.patch.patch` finds networks and loops, and tries what it has put in their place."""
