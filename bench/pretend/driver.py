"""Triton's launch path on a CUDA driver that launches nothing, as an H100's would be."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.gpu.cache import Seen, watch

SOURCE = Path(__file__).with_name("libcuda.c")


def build() -> Path:
    """Compile the driver; returns its folder.

    Raises:
        RuntimeError: There is no C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(
            "the pretended driver is compiled, and there is no C compiler: install gcc, or set CC"
        )
    folder = Path(tempfile.mkdtemp(prefix="pretended-cuda-"))
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE],
        check=True,
    )
    (folder / "libcuda.so").symlink_to(library)  # what launchers are linked against
    return folder


def install() -> Seen:
    """Make the pretended driver Triton's, in this process; launches are counted from now on."""
    folder = build()
    # Read when Triton builds its first launcher.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library.pretended_launches.restype = ctypes.c_long

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class PretendedDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # CudaDriver's own asks torch.cuda for what is not there
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return 9, 0

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(PretendedDriver())
    seen = watch()
    seen.launched = library.pretended_launches
    return seen
