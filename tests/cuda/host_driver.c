// A CUDA driver that is the host, as far as PyCUDA and trtseg ask it: device memory is host memory,
// streams do their work at once, and kernels are host functions from the library that
// TRTSEG_HOST_KERNELS names (kernels.cu compiled with TRTSEG_HOST). There are two devices, of which
// each thread has a stack of contexts. It is stricter than a real one: calls that need a current
// context fail without one or with one that was given back, and copies must lie within live memory.
// Everything else PyCUDA links to is put beside it by tests/cuda/test_pycuda.py and fails with 801,
// not supported. Error codes are those of cuda.h.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int Result;
typedef unsigned long long Address;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200 };
enum { INVALID_CONTEXT = 201, INVALID_SOURCE = 300, INVALID_HANDLE = 400, NOT_FOUND = 500 };
enum { ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, LAUNCH_POINTER = 1, LAUNCH_SIZE = 2, ERROR_LOG = 5 };
enum { DEVICES = 2, DEPTH = 8 };

static const size_t TOTAL = (size_t)4 << 30;
static size_t used;
static int streams, events;
static int primary[DEVICES];  // how often it was retained; its address is the context
static __thread void* current[DEPTH];
static __thread int depth;

struct Block {
    void* start;
    size_t size;
    struct Block* next;
};
static struct Block* live;

static int usable(void) {
    for (int one = 0; one < DEVICES; ++one) {
        if (depth && current[depth - 1] == &primary[one]) return primary[one] > 0;
    }
    return 0;
}

#define NEEDS_CONTEXT \
    if (!usable()) return INVALID_CONTEXT

// What was handed out and not given back, in order: memory, streams, events, contexts; and how many
// contexts are still current in this thread, one above the other.
void host_driver_left(int* counts) {
    counts[0] = 0;
    for (struct Block* one = live; one; one = one->next) ++counts[0];
    counts[1] = streams;
    counts[2] = events;
    counts[3] = 0;
    for (int one = 0; one < DEVICES; ++one) counts[3] += primary[one];
    counts[4] = depth;
}

static void* take(size_t size) {
    struct Block* block = malloc(sizeof *block);
    block->start = aligned_alloc(256, (size + 255) / 256 * 256);
    block->size = size;
    block->next = live;
    live = block;
    used += size;
    return memset(block->start, 0xA5, size);
}

static Result give_back(void* start) {
    for (struct Block** at = &live; *at; at = &(*at)->next) {
        struct Block* block = *at;
        if (block->start != start) continue;
        *at = block->next;
        used -= block->size;
        free(block->start);
        free(block);
        return OK;
    }
    return INVALID_VALUE;
}

static int within(Address start, size_t size) {
    for (struct Block* one = live; one; one = one->next) {
        Address begin = (Address)one->start;
        if (start >= begin && start + size <= begin + one->size) return 1;
    }
    return 0;
}

static Result copy(Address target, Address source, size_t size) {
    if (!within(target, size) || !within(source, size)) return INVALID_VALUE;
    memcpy((void*)target, (void*)source, size);
    return OK;
}

Result cuInit(unsigned flags) { return OK; }
Result cuDriverGetVersion(int* version) { return *version = 13000, OK; }
Result cuGetErrorString(Result error, const char** text) {
    static char written[32];
    snprintf(written, sizeof written, "error %d", error);
    *text = written;
    return OK;
}
Result cuDeviceGetCount(int* count) { return *count = DEVICES, OK; }
Result cuDeviceGet(int* device, int number) {
    *device = number;
    return number >= 0 && number < DEVICES ? OK : INVALID_DEVICE;
}
Result cuDeviceGetName(char* name, int size, int device) {
    snprintf(name, size, "host driver");
    return OK;
}
Result cuDeviceComputeCapability(int* major, int* minor, int device) {
    return *major = 8, *minor = 6, OK;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == ATTRIBUTE_MAJOR ? 8 : attribute == ATTRIBUTE_MINOR ? 6 : 1;
    return OK;
}
Result cuDeviceTotalMem_v2(size_t* size, int device) { return *size = TOTAL, OK; }

Result cuDevicePrimaryCtxRetain(void** made, int device) {
    *made = &primary[device];
    return ++primary[device], OK;
}
Result cuDevicePrimaryCtxRelease_v2(int device) {
    if (!primary[device]) return INVALID_CONTEXT;
    return --primary[device], OK;  // where it is current, it stays so
}
Result cuCtxPushCurrent_v2(void* one) {
    if (!one || depth == DEPTH) return INVALID_CONTEXT;
    return current[depth++] = one, OK;
}
Result cuCtxPopCurrent_v2(void** one) {
    if (!depth) return INVALID_CONTEXT;
    return *one = current[--depth], OK;
}
Result cuCtxGetCurrent(void** one) { return *one = depth ? current[depth - 1] : NULL, OK; }
Result cuCtxGetDevice(int* device) {
    NEEDS_CONTEXT;
    return *device = (int)((int*)current[depth - 1] - primary), OK;
}
Result cuCtxGetApiVersion(void* one, unsigned* version) { return *version = 13000, OK; }

Result cuMemGetInfo_v2(size_t* available, size_t* total) {
    NEEDS_CONTEXT;
    return *available = TOTAL - used, *total = TOTAL, OK;
}
Result cuMemAlloc_v2(Address* address, size_t size) {
    NEEDS_CONTEXT;
    if (!size) return INVALID_VALUE;
    if (size > TOTAL - used) return OUT_OF_MEMORY;
    return *address = (Address)take(size), OK;
}
Result cuMemFree_v2(Address address) {
    NEEDS_CONTEXT;
    return give_back((void*)address);
}
Result cuMemHostAlloc(void** memory, size_t size, unsigned flags) {
    NEEDS_CONTEXT;
    return *memory = take(size), OK;
}
Result cuMemFreeHost(void* memory) {
    NEEDS_CONTEXT;
    return give_back(memory);
}
Result cuMemcpyHtoDAsync_v2(Address target, const void* source, size_t size, void* stream) {
    NEEDS_CONTEXT;
    return copy(target, (Address)source, size);
}
Result cuMemcpyDtoHAsync_v2(void* target, Address source, size_t size, void* stream) {
    NEEDS_CONTEXT;
    return copy((Address)target, source, size);
}
Result cuMemcpyDtoDAsync_v2(Address target, Address source, size_t size, void* stream) {
    NEEDS_CONTEXT;
    return copy(target, source, size);
}
Result cuMemsetD8Async(Address target, unsigned char value, size_t size, void* stream) {
    NEEDS_CONTEXT;
    if (!within(target, size)) return INVALID_VALUE;
    return memset((void*)target, value, size), OK;
}

Result cuStreamCreate(void** stream, unsigned flags) {
    NEEDS_CONTEXT;
    *stream = malloc(1);
    return ++streams, OK;
}
Result cuStreamDestroy_v2(void* stream) {
    NEEDS_CONTEXT;
    free(stream);
    return --streams, OK;
}
Result cuStreamSynchronize(void* stream) {
    NEEDS_CONTEXT;
    return OK;
}
Result cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
    NEEDS_CONTEXT;
    return OK;
}

Result cuEventCreate(double** event, unsigned flags) {
    NEEDS_CONTEXT;
    *event = calloc(1, sizeof **event);
    return ++events, OK;
}
Result cuEventDestroy_v2(double* event) {
    NEEDS_CONTEXT;
    free(event);
    return --events, OK;
}
Result cuEventRecord(double* event, void* stream) {
    NEEDS_CONTEXT;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return *event = now.tv_sec + 1e-9 * now.tv_nsec, OK;
}
Result cuEventSynchronize(double* event) {
    NEEDS_CONTEXT;
    return OK;
}
Result cuEventElapsedTime_v2(float* milliseconds, double* first, double* last) {
    NEEDS_CONTEXT;
    if (!*first || !*last) return INVALID_HANDLE;  // never recorded
    return *milliseconds = (float)(1e3 * (*last - *first)), OK;
}

Result cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* o, void** v) {
    NEEDS_CONTEXT;
    if (!strncmp(image, "bad", 3)) {
        // A log that the driver does not write is what the memory held before.
        for (unsigned i = 0; i < count; ++i) {
            if (o[i] == ERROR_LOG) memcpy(v[i], "\xFF\xE0", 3);
        }
        return INVALID_IMAGE;
    }
    *module = dlopen(getenv("TRTSEG_HOST_KERNELS"), RTLD_NOW);
    return *module ? OK : INVALID_SOURCE;
}
Result cuModuleUnload(void* module) {
    NEEDS_CONTEXT;
    return OK;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
    NEEDS_CONTEXT;
    *function = dlsym(module, name);
    return *function ? OK : NOT_FOUND;
}
Result cuFuncSetBlockShape(void* function, int x, int y, int z) { return OK; }
Result cuLaunchKernel(
    void (*function)(const void*, long long), unsigned grid, unsigned grid_y, unsigned grid_z,
    unsigned block, unsigned block_y, unsigned block_z, unsigned shared, void* stream,
    void** parameters, void** extra
) {
    NEEDS_CONTEXT;
    const void* buffer = NULL;
    size_t size = 0;
    for (; extra && *extra; extra += 2) {
        if ((size_t)extra[0] == LAUNCH_POINTER) buffer = extra[1];
        if ((size_t)extra[0] == LAUNCH_SIZE) size = *(size_t*)extra[1];
    }
    if (!buffer || !size || grid_y * grid_z * block_y * block_z != 1) return INVALID_VALUE;
    function(buffer, (long long)grid * block);
    return OK;
}
