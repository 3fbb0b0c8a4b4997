/* The driver functions that Triton 3.6 to 3.9 call, doing nothing, for an H100: bench/pretend/driver.py. */
#include <stddef.h>
#include <stdint.h>

typedef int Result; /* CUresult; 0 is success */
#define API __attribute__((visibility("default")))

API Result cuInit(unsigned flags) { return 0; }
API Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
API Result cuGetErrorString(Result error, const char **text) { *text = "pretended"; return 0; }
API Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
API Result cuCtxSetCurrent(void *context) { return 0; }
API Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
API Result cuCtxSetLimit(int limit, size_t value) { return 0; }
API Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
API Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
API Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
API Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }

API Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;           /* WARP_SIZE */
  case 16: *value = 132; break;          /* MULTIPROCESSOR_COUNT */
  case 75: *value = 9; break;            /* COMPUTE_CAPABILITY_MAJOR */
  case 76: *value = 0; break;            /* COMPUTE_CAPABILITY_MINOR */
  case 81: *value = 228 * 1024; break;   /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
  case 97: *value = 227 * 1024; break;   /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
  default: *value = 65536;
  }
  return 0;
}

API Result cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
API Result cuModuleUnload(void *module) { return 0; }
API Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
API Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; /* MAX_THREADS_PER_BLOCK, NUM_REGS */
  return 0;
}
API Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
API Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
API Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}
API Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
API Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
API Result cuTensorMapEncodeTiled(void) { return 0; }
API Result cuTensorMapEncodeIm2col(void) { return 0; }
API Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  return 0;
}
API Result cuLaunchCooperativeKernel(void) { return 0; }
