/* libcuda and libnvrtc for a machine without either: the real launcher compiles, loads and launches through these, and the
 * kernels run on the CPU in the host build (cuda/shim.h). "Compiling" answers with the path of that build, which
 * FAKE_CUDA_BUILDS names as a folder of <source>.so; loading opens it. Limits of a device are enforced, calls are counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    unsigned grid[3], threads[3], shared_bytes;
    int reversed;
    char error[256];
} launch;
typedef int (*entry)(launch *, void **);
typedef struct {
    entry run;
    int allowed;
} function;
typedef struct {
    char name[64], image[4096];
} program;

enum { OK = 0, INVALID_VALUE = 1, NOT_FOUND = 500, INVALID_IMAGE = 200, LAUNCH_FAILED = 719, OPTIN = 101376, PLAIN = 49152 };

int fake_reversed, fake_compilations, fake_launches, fake_capability = 90;
char fake_error[256];

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x1234; return device ? 101 : OK; }
int cuCtxPushCurrent_v2(void *context) { return context == (void *)0x1234 ? OK : 201; }
int cuCtxPopCurrent_v2(void **context) { *context = (void *)0x1234; return OK; }

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    switch (attribute) {
    case 16: *value = 4; return OK;
    case 75: *value = fake_capability / 10; return OK;
    case 76: *value = fake_capability % 10; return OK;
    case 97: *value = OPTIN; return OK;
    }
    return INVALID_VALUE;
}

int cuModuleLoadData(void **module, const void *image)
{
    *module = memcmp(image, "host:", 5) ? NULL : dlopen((const char *)image + 5, RTLD_NOW | RTLD_LOCAL);
    return *module ? OK : INVALID_IMAGE;
}

int cuModuleGetFunction(function **out, void *module, const char *name)
{
    char symbol[128];
    snprintf(symbol, sizeof symbol, "shim_%s", name);
    entry run = (entry)dlsym(module, symbol);
    if (!run)
        return NOT_FOUND;
    *out = malloc(sizeof **out);
    (*out)->run = run;
    (*out)->allowed = PLAIN;
    return OK;
}

int cuFuncSetAttribute(function *f, int attribute, int value)
{
    if (attribute != 8 || value > OPTIN)
        return INVALID_VALUE;
    f->allowed = value;
    return OK;
}

int cuLaunchKernel(function *f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **arguments, void **extra)
{
    launch l = {{gx, gy, gz}, {tx, ty, tz}, shared, fake_reversed, ""};
    if (!gx || gy > 65535 || gz != 1 || tx * ty * tz > 1024 || (int)shared > f->allowed || stream || extra)
        return INVALID_VALUE;
    fake_launches++;
    if (f->run(&l, arguments)) {
        memcpy(fake_error, l.error, sizeof fake_error);
        return LAUNCH_FAILED;
    }
    return OK;
}

int cuGetErrorName(int code, const char **text)
{
    *text = code == LAUNCH_FAILED ? fake_error : code == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND"
          : code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : NULL;
    return *text ? OK : INVALID_VALUE;
}

int nvrtcVersion(int *major, int *minor) { *major = 12; *minor = 9; return OK; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 3; return OK; }
int nvrtcGetSupportedArchs(int *archs) { archs[0] = 80; archs[1] = 86; archs[2] = 90; return OK; }

int nvrtcCreateProgram(program **out, const char *source, const char *name, int headers, const char **texts, const char **names)
{
    program *p = calloc(1, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", name);
    *out = p;
    return strstr(source, "__global__") && headers == 1 && !strcmp(names[0], "core.cuh") && strlen(texts[0]) ? OK : 4;
}

int nvrtcCompileProgram(program *p, int count, const char **options)
{
    const char *folder = getenv("FAKE_CUDA_BUILDS");
    int fmad = 0;
    for (int i = 0; i < count; i++)
        fmad |= !strcmp(options[i], "--fmad=false");
    fake_compilations++;
    if (!folder || !fmad)
        return 6;
    *strrchr(p->name, '.') = 0;
    snprintf(p->image, sizeof p->image, "host:%s/%s.so", folder, p->name);
    return OK;
}

int nvrtcGetProgramLogSize(program *p, size_t *size) { (void)p; *size = 32; return OK; }
int nvrtcGetProgramLog(program *p, char *log) { (void)p; snprintf(log, 32, "fake.cu(1): error: no builds"); return OK; }
int nvrtcGetCUBINSize(program *p, size_t *size) { *size = strlen(p->image) + 1; return OK; }
int nvrtcGetCUBIN(program *p, char *out) { memcpy(out, p->image, strlen(p->image) + 1); return OK; }
int nvrtcGetPTXSize(program *p, size_t *size) { return nvrtcGetCUBINSize(p, size); }
int nvrtcGetPTX(program *p, char *out) { return nvrtcGetCUBIN(p, out); }
int nvrtcDestroyProgram(program **p) { free(*p); *p = NULL; return OK; }
