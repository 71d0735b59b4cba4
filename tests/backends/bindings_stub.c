// Stands for the libraries that TensorRT's Python bindings link to (its own, its parser, its
// plugins): all that they import of them. With TRTSEG_BENEATH unset nothing can be made, as on a
// machine without a GPU. Set, it names the folder of a TensorRT-RTX whose objects are laid out like
// this TensorRT's, and is what the bindings then drive.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void* found(const char* file, const char* function) {
    const char* folder = getenv("TRTSEG_BENEATH");
    if (!folder) return NULL;
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!library) fprintf(stderr, "%s\n", dlerror());
    return library ? dlsym(library, function) : NULL;
}

#define BENEATH(function) found("libtensorrt_rtx.so.1", function)
#define PARSER(function) found("libtensorrt_onnxparser_rtx.so.1", function)

int32_t getInferLibVersion(void) {
    int32_t (*version)(void) = BENEATH("getInferLibVersion");
    return version ? version() : 0;
}
int getNvOnnxParserVersion(void) {
    int (*version)(void) = PARSER("getNvOnnxParserVersion");
    return version ? version() : 0;
}
void* createInferBuilder_INTERNAL(void* logger, int32_t version) {
    void* (*create)(void*, int32_t) = BENEATH("createInferBuilder_INTERNAL");
    return create ? create(logger, getInferLibVersion()) : NULL;
}
void* createInferRuntime_INTERNAL(void* logger, int32_t version) {
    void* (*create)(void*, int32_t) = BENEATH("createInferRuntime_INTERNAL");
    return create ? create(logger, getInferLibVersion()) : NULL;
}
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) {
    void* (*create)(void*, void*, int) = PARSER("createNvOnnxParser_INTERNAL");
    return create ? create(network, logger, getNvOnnxParserVersion()) : NULL;
}
void* createInferRefitter_INTERNAL(void* engine, void* logger, int32_t version) { return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int v) { return NULL; }
void* getBuilderPluginRegistry(int32_t capability) { return NULL; }
void* getPluginRegistry(void) { return NULL; }
int initLibNvInferPlugins(void* logger, const char* space) { return 1; }
