/* LD_PRELOAD: write, fsync and link fail below DRILL_FAULT_BELOW while the file DRILL_FAULT_SWITCH exists.
 * The file holds the error number (ENOSPC 28, EIO 5). Everything else goes through.
 * With DRILL_KILL_AFTER=n the process ends by SIGKILL inside a write, when n bytes below that folder are written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
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

static int is_file_below(int file) {
    char link[64], path[PATH_MAX] = {0};
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    return length > 0 && is_below(path);
}

static int fails(int file) {
    int error = is_file_below(file) ? fault() : 0;
    if (error) errno = error;
    return error != 0;
}

/* Write what may be written before the process ends, and end it; return when it may live. */
static void die_inside(int file, const void *data, size_t count) {
    static size_t written;
    const char *limit = getenv("DRILL_KILL_AFTER");
    if (limit == NULL || !is_file_below(file)) return;
    size_t left = (size_t)atoll(limit) - written;
    if (count > left) {
        syscall(SYS_write, file, data, left);
        kill(getpid(), SIGKILL);
    }
    written += count;
}

ssize_t write(int file, const void *data, size_t count) {
    die_inside(file, data, count);
    return fails(file) ? -1 : syscall(SYS_write, file, data, count);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    for (int i = 0; i < count; i++) die_inside(file, parts[i].iov_base, parts[i].iov_len);
    return fails(file) ? -1 : syscall(SYS_writev, file, parts, count);
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
