// A CUDA driver without a GPU, as much of it as Triton calls: every launch succeeds and does
// nothing. Built by tests/fake_gpu.py.

using handle = void*;

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuCtxGetCurrent(long* context) { return *context = 16, 0; }
int cuCtxSetCurrent(handle) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(long* value, int) { return *value = 0, 0; }
int cuCtxSetLimit(int, long) { return 0; }
int cuDevicePrimaryCtxRetain(long* context, int) { return *context = 16, 0; }
int cuModuleLoadData(long* module, const void*) { return *module = 16, 0; }
int cuModuleUnload(handle) { return 0; }
int cuFuncSetCacheConfig(handle, int) { return 0; }
int cuFuncSetAttribute(handle, int, int) { return 0; }
int cuStreamIsCapturing(handle, int* capturing) { return *capturing = 0, 0; }
int cuGetErrorString(int, const char** text) { return *text = "fake", 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, handle, const void*) { return *clusters = 1, 0; }
int cuLaunchKernelEx(const void*, handle, void**, void**) { return 0; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:  // multiprocessors
      return *value = 132, 0;
    case 75:  // compute capability
      return *value = 9, 0;
    case 76:
      return *value = 0, 0;
    default:  // shared memory, in bytes
      return *value = 232448, 0;
  }
}

int cuFuncGetAttribute(int* value, int attribute, handle) {
  return *value = attribute == 0 ? 1024 : 0, 0;  // 0: threads that a program may have
}

// a function of its own for each compiled kernel
int cuModuleGetFunction(long* function, handle, const char*) {
  static long last = 16;
  return *function = last += 16, 0;
}

// memory of the CPU has the same address on the device
int cuPointerGetAttribute(long* value, int, long pointer) { return *value = pointer, 0; }
}
