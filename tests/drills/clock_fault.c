/* LD_PRELOAD: the wall clock is off by the number of seconds (int64) in the file DRILL_CLOCK, read again at every look.
 * Clocks that only measure are right, as after `date -s`. Deadlines that a process has computed from the wrong time are
 * put right on their way into the kernel, whose clock does not jump here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Deadlines before this are of a clock that counts from the start of the machine. */
static const time_t SOME_WALL_CLOCK_TIME = 1000000000;

static int64_t offset(void) {
    static const volatile int64_t *shared;
    if (shared == NULL) {
        const char *path = getenv("DRILL_CLOCK");
        int file = path == NULL ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
        if (file < 0) return 0;
        void *mapped = mmap(NULL, sizeof *shared, PROT_READ, MAP_SHARED, file, 0);
        syscall(SYS_close, file);
        if (mapped == MAP_FAILED) return 0;
        shared = mapped;
    }
    return *shared;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = (int)syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += offset();
    return result;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result != NULL) *result = now.tv_sec;
    return now.tv_sec;
}

static struct timespec put_right(const struct timespec *deadline) {
    struct timespec right = *deadline;
    if (right.tv_sec > SOME_WALL_CLOCK_TIME) right.tv_sec -= offset();
    return right;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *deadline) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (wait == NULL) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec right = put_right(deadline);
    return wait(cond, mutex, &right);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *deadline) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (wait == NULL) wait = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec right = put_right(deadline);
    return wait(semaphore, &right);
}
