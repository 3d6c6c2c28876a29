/* A libnvidia-ml.so.1 for tests: it shows what the file $FAKE_NVML says, read anew at every call. Its lines:

     gpu UUID NAME TOTAL_MIB USED_MIB UTILIZATION_PERCENT CELSIUS MILLIWATTS     (a number below 0: not supported)
     process GPU PID
     fail FUNCTION CODE

   Symbols that it lacks are, as in an old driver, NVML_ERROR_FUNCTION_NOT_FOUND for pynvml. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, MAX = 16 };

typedef struct { char uuid[96], name[96]; long total, used, utilization, celsius, milliwatts; } Gpu;
typedef struct { int gpu; unsigned pid; } Process;
typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } ProcessInfo;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;

static int initialized, gpus, processes;
static Gpu gpu[MAX];
static Process process[MAX];

/* Read the file; the code with which `function` shall fail. */
static int look(const char *function) {
    char line[512], name[96];
    int code, result = OK;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    gpus = processes = 0;
    while (file && fgets(line, sizeof line, file)) {
        Gpu *g = &gpu[gpus];
        Process *p = &process[processes];
        if (sscanf(line, "gpu %95s %95s %ld %ld %ld %ld %ld", g->uuid, g->name, &g->total, &g->used, &g->utilization,
                   &g->celsius, &g->milliwatts) == 7) gpus++;
        else if (sscanf(line, "process %d %u", &p->gpu, &p->pid) == 2) processes++;
        else if (sscanf(line, "fail %95s %d", name, &code) == 2 && !strcmp(name, function)) result = code;
    }
    if (file) fclose(file);
    return result;
}

#define BEGIN int failure = look(__func__); if (failure) return failure; if (!initialized) return UNINITIALIZED;
#define DEVICE BEGIN long index = (long)device - 1; if (index < 0 || index >= gpus) return INVALID_ARGUMENT; Gpu *g = &gpu[index];
#define NUMBER(value) if ((value) < 0) return NOT_SUPPORTED; *out = (unsigned)(value); return OK;

static int copy(char *out, unsigned size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; int code = look(__func__); initialized = code == OK; return code; }
int nvmlShutdown(void) { initialized = 0; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "as the test wants it"; }
int nvmlDeviceGetCount_v2(unsigned *out) { BEGIN *out = gpus; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {
    BEGIN if ((int)i >= gpus) return INVALID_ARGUMENT;
    *out = (void *)(long)(i + 1);
    return OK;
}
int nvmlDeviceGetUUID(void *device, char *out, unsigned size) { DEVICE return copy(out, size, g->uuid); }
int nvmlDeviceGetName(void *device, char *out, unsigned size) { DEVICE return copy(out, size, g->name); }
int nvmlDeviceGetMemoryInfo(void *device, Memory *out) {
    DEVICE out->total = (unsigned long long)g->total << 20;
    out->used = (unsigned long long)g->used << 20;
    out->free = out->total - out->used;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, Utilization *out) {
    DEVICE if (g->utilization < 0) return NOT_SUPPORTED;
    out->gpu = (unsigned)g->utilization;
    out->memory = 0;
    return OK;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *out) { (void)sensor; DEVICE NUMBER(g->celsius) }
int nvmlDeviceGetPowerUsage(void *device, unsigned *out) { DEVICE NUMBER(g->milliwatts) }
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *out) {
    DEVICE (void)g;
    unsigned room = *count, found = 0;
    for (int i = 0; i < processes; i++)
        if (process[i].gpu == index) {
            if (found < room) out[found] = (ProcessInfo){process[i].pid, 1 << 20, ~0u, ~0u};
            found++;
        }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
