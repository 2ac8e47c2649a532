/* LD_PRELOAD: write, fsync and link fail below DRILL_FAULT_BELOW while the file DRILL_FAULT_SWITCH exists.
 * The file holds the error number (ENOSPC 28, EIO 5). Everything else goes through. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_below(const char *path) {
    const char *folder = getenv("DRILL_FAULT_BELOW");
    return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

/* The error to report now, 0 for none. Bare system calls: the wrapped ones would come back here. */
static int fault(void) {
    char text[8] = {0};
    const char *path = getenv("DRILL_FAULT_SWITCH");
    int file = path == NULL ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
    if (file < 0) return 0;
    syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    return atoi(text);
}

static int fails(int file) {
    char link[64], path[PATH_MAX] = {0};
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    int error = length > 0 && is_below(path) ? fault() : 0;
    errno = error ? error : saved;
    return error != 0;
}

ssize_t write(int file, const void *data, size_t count) {
    return fails(file) ? -1 : syscall(SYS_write, file, data, count);
}

int fsync(int file) { return fails(file) ? -1 : (int)syscall(SYS_fsync, file); }

int linkat(int from, const char *path, int to, const char *target, int flags) {
    int error = is_below(target) ? fault() : 0;
    if (error) {
        errno = error;
        return -1;
    }
    return (int)syscall(SYS_linkat, from, path, to, target, flags);
}

int link(const char *path, const char *target) { return linkat(AT_FDCWD, path, AT_FDCWD, target, 0); }
