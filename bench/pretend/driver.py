"""Triton's launch path with a simulated H100 driver that launches nothing."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")


def build() -> Path:
    """Compile the driver if necessary, and return its folder, which all processes share.

    Raises:
        RuntimeError: There is no C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the simulated driver needs a C compiler: install gcc, or set CC")
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"pretended-cuda-{os.getuid()}-{source}"
    if folder.is_dir():
        return folder
    making = Path(tempfile.mkdtemp(prefix=folder.name))
    library = making / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE],
        check=True,
    )
    (making / "libcuda.so").symlink_to(library.name)  # the name that launchers link against
    try:
        making.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return folder


def install() -> None:
    """Install the simulated driver in Triton, in this process."""
    folder = build()
    # Read when Triton builds its first launcher.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class PretendedDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # CudaDriver's own queries torch.cuda
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return 9, 0

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(PretendedDriver())
