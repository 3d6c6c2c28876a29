/* A libnvidia-ml.so.1 for tests: it shows what the file $FAKE_NVML says, read anew at every call. Its lines:

     driver VERSION CUDA                            without it: 570.00 12080
     gpu UUID NAME TOTAL_MIB USED_MIB UTILIZATION_PERCENT CELSIUS MILLIWATTS
                                                    a number below 0: not supported; _ in a name: a space
     mig GPU UUID PROFILE TOTAL_MIB USED_MIB        a MIG instance; its GPU is in MIG mode
     mode GPU                                       this GPU is in MIG mode, also without instances
     process GPU PID [MIB [INSTANCE]]               it computes, in this MIG instance of the GPU; without MIB: as much as 1
     graphics GPU PID [MIB]                         it draws
     fail FUNCTION CODE [GPU]                       the function fails with this code of NVML, for every GPU or for this one
     hang FUNCTION [GPU]                            it does not return while the line is there, a minute at most

   `fail` and `hang` know the wildcard * for all functions but those that begin and end a session.

   As in the real library, sessions are counted (nvmlInit, nvmlShutdown), and outside of one everything is UNINITIALIZED.
   Once a function has failed with DRIVER_NOT_LOADED, all sessions are dead until the next one begins. Once one has failed with
   GPU_IS_LOST, that GPU stays lost until the first of new sessions begins, whatever the file says.

   Built with -DOLD it is a driver of 2021: what came later is missing, which pynvml makes NVML_ERROR_FUNCTION_NOT_FOUND. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, MAX = 32, PARTS = 7, EVERY = -1, HANG = -1
};

typedef struct { char uuid[96], name[96]; long total, used, utilization, celsius, milliwatts; } Gpu;
typedef struct { int gpu; char uuid[96], profile[32]; long total, used; } Part;
typedef struct { int gpu, graphics, part; unsigned pid; long memory; } Process;
typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } ProcessInfo;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned gpu, memory; } Utilization;

static int sessions, gpus, parts, processes, cuda, mode[MAX], lost[MAX];
static char driver[80];
static Gpu gpu[MAX];
static Part part[MAX * PARTS];
static Process process[256];

/* A handle is a number: that of a GPU plus 1, that of a MIG instance (over all GPUs) plus 1001. */
static Part *part_of(void *device) {
    long n = (long)device - 1001;
    return n >= 0 && n < parts ? &part[n] : NULL;
}
static int gpu_of(void *device) {
    Part *m = part_of(device);
    return m ? m->gpu : (int)(long)device - 1;
}

static int concerns(const char *name, const char *function, int which, int device) {
    if (which != EVERY && which != device) return 0;
    if (!strcmp(name, "*")) return strcmp(function, "nvmlInitWithFlags") && strcmp(function, "nvmlShutdown");
    return !strcmp(name, function);
}

/* Read the file; the code with which `function` shall fail for this GPU, or HANG. */
static int read_state(const char *function, int device) {
    char line[512], name[96];
    int code, which, result = OK;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    gpus = parts = processes = 0;
    memset(mode, 0, sizeof mode);
    strcpy(driver, "570.00");
    cuda = 12080;
    while (file && fgets(line, sizeof line, file)) {
        Gpu *g = &gpu[gpus];
        Part *m = &part[parts];
        Process *p = &process[processes];
        *p = (Process){0, 0, EVERY, 0, 1};
        which = EVERY;
        if (sscanf(line, "gpu %95s %95s %ld %ld %ld %ld %ld", g->uuid, g->name, &g->total, &g->used, &g->utilization,
                   &g->celsius, &g->milliwatts) == 7 && gpus < MAX) {
            for (char *c = g->name; *c; c++) if (*c == '_') *c = ' ';
            gpus++;
        } else if (sscanf(line, "mig %d %95s %31s %ld %ld", &m->gpu, m->uuid, m->profile, &m->total, &m->used) == 5) {
            mode[m->gpu] = 1;
            parts++;
        } else if (sscanf(line, "process %d %u %ld %d", &p->gpu, &p->pid, &p->memory, &p->part) >= 2) processes++;
        else if (sscanf(line, "graphics %d %u %ld", &p->gpu, &p->pid, &p->memory) >= 2) { p->graphics = 1; processes++; }
        else if (sscanf(line, "mode %d", &which) == 1) mode[which] = 1;
        else if (sscanf(line, "driver %79s %d", driver, &cuda) == 2) continue;
        else if (sscanf(line, "fail %95s %d %d", name, &code, &which) >= 2) {
            if (concerns(name, function, which, device)) result = code;
        } else if (sscanf(line, "hang %95s %d", name, &which) >= 1 && concerns(name, function, which, device)) {
            result = HANG;
            break;
        }
    }
    if (file) fclose(file);
    return result;
}

static int look(const char *function, void *device) {
    struct timespec pause = {0, 10000000};
    int code = read_state(function, device ? gpu_of(device) : EVERY);
    for (int i = 0; i < 6000 && code == HANG; i++) {
        nanosleep(&pause, NULL);
        code = read_state(function, device ? gpu_of(device) : EVERY);
    }
    if (code == DRIVER_NOT_LOADED) sessions = 0;
    if (code == GPU_IS_LOST && device && gpu_of(device) >= 0) lost[gpu_of(device)] = 1;
    return code;
}

#define BEGIN(device) \
    int failure = look(__func__, device); \
    if (failure) { return failure; } \
    if (!sessions) { return UNINITIALIZED; }
#define DEVICE \
    BEGIN(device) \
    int index = gpu_of(device); \
    if (index < 0 || index >= gpus) { return INVALID_ARGUMENT; } \
    if (lost[index]) { return GPU_IS_LOST; } \
    Gpu *g = &gpu[index]; \
    Part *m = part_of(device); \
    (void)g, (void)m;
#define NUMBER(value) if (m || (value) < 0) return NOT_SUPPORTED; *out = (unsigned)(value); return OK;

static int copy(char *out, unsigned size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = look(__func__, NULL);
    if (code == OK && sessions++ == 0) memset(lost, 0, sizeof lost);
    return code;
}
int nvmlShutdown(void) { BEGIN(NULL) sessions--; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "as the test wants it"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { BEGIN(NULL) return copy(out, size, driver); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { BEGIN(NULL) *out = cuda; return OK; }
int nvmlDeviceGetCount_v2(unsigned *out) { BEGIN(NULL) *out = gpus; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {
    void *device = (void *)(long)(i + 1);
    DEVICE
    *out = device;
    return OK;
}
int nvmlDeviceGetUUID(void *device, char *out, unsigned size) { DEVICE return copy(out, size, m ? m->uuid : g->uuid); }
int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    DEVICE
    char text[160];
    snprintf(text, sizeof text, m ? "%s MIG %s" : "%s", g->name, m ? m->profile : "");
    return copy(out, size, text);
}
int nvmlDeviceGetUtilizationRates(void *device, Utilization *out) {
    DEVICE if (m || g->utilization < 0) return NOT_SUPPORTED;
    *out = (Utilization){(unsigned)g->utilization, 0};
    return OK;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *out) { (void)sensor; DEVICE NUMBER(g->celsius) }
int nvmlDeviceGetPowerUsage(void *device, unsigned *out) { DEVICE NUMBER(g->milliwatts) }

/* The older function counts what the driver reserves as used. */
enum { RESERVED_MIB = 600 };
int nvmlDeviceGetMemoryInfo(void *device, Memory *out) {
    DEVICE if (g->total < 0) return NOT_SUPPORTED;
    out->total = (unsigned long long)(m ? m->total : g->total) << 20;
    out->used = (unsigned long long)(m ? m->used : g->used + RESERVED_MIB) << 20;
    out->free = out->total - out->used;
    return OK;
}

static int list(int graphics, void *device, unsigned *count, ProcessInfo *out) {
    unsigned room = out ? *count : 0, found = 0;
    Part *m = part_of(device);
    int index = gpu_of(device), ordinal = EVERY;
    for (Part *each = part; m && each <= m; each++) ordinal += each->gpu == index;
    for (int i = 0; i < processes; i++)
        if (process[i].gpu == index && process[i].graphics == graphics && (!m || process[i].part == ordinal)) {
            unsigned long long memory = process[i].memory < 0 ? ~0ull : (unsigned long long)process[i].memory << 20;
            if (found < room) out[found] = (ProcessInfo){process[i].pid, memory, ~0u, ~0u};
            found++;
        }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

#ifdef OLD
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, ProcessInfo *out) {
    DEVICE return list(0, device, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *device, unsigned *count, ProcessInfo *out) {
    DEVICE return list(1, device, count, out);
}
#else
int nvmlDeviceGetMemoryInfo_v2(void *device, MemoryV2 *out) {
    DEVICE if (g->total < 0) return NOT_SUPPORTED;
    out->total = (unsigned long long)(m ? m->total : g->total) << 20;
    out->used = (unsigned long long)(m ? m->used : g->used) << 20;
    out->reserved = m ? 0 : (unsigned long long)RESERVED_MIB << 20;
    out->free = out->total - out->used - out->reserved;
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *out) {
    DEVICE return list(0, device, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *out) {
    DEVICE return list(1, device, count, out);
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    DEVICE *current = *pending = mode[index];
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { DEVICE *count = mode[index] ? PARTS : 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned wanted, void **out) {
    DEVICE
    unsigned ordinal = 0;
    for (int i = 0; i < parts; i++)
        if (part[i].gpu == index && ordinal++ == wanted) { *out = (void *)(long)(i + 1001); return OK; }
    return NOT_FOUND;
}
#endif
