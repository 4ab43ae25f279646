/* The CUDA runtime functions that torch calls around every operation, for one device that does not exist.
 * Loaded before the real library; each returns 0, cudaSuccess. Streams and events are numbers that nothing follows. */
#include <stddef.h>

int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)0x10; return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)0x20; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }

/* Of the driver: whether the device is in use. The library is named as the driver's, so that torch finds this one. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
