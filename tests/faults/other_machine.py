"""Another machine, as a process sees it: a library that is loaded before C's own and answers in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

/* MACHINE_CLOCK: each second reading of the wall clock is ten years ahead, and the others go back by an hour each */
int clock_gettime(clockid_t clock, struct timespec *now) {
    static __thread long readings;
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME && getenv("MACHINE_CLOCK"))
        now->tv_sec += ++readings % 2 ? -3600 * readings : 315360000 - 3600 * readings;
    return failed;
}

/* MACHINE_FLOCK: what flock answers of files below MACHINE_FOLDER: an errno, or 0 for a lock that reaches nobody */
int flock(int descriptor, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    const char *answer = getenv("MACHINE_FLOCK"), *folder = getenv("MACHINE_FOLDER");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (!answer || !folder || size < 0) return real(descriptor, operation);
    path[size] = 0;
    if (strncmp(path, folder, strlen(folder))) return real(descriptor, operation);
    errno = atoi(answer);
    return errno ? -1 : 0;
}

/* MACHINE_NAME: the name of the host */
int uname(struct utsname *found) {
    int (*real)(struct utsname *) = dlsym(RTLD_NEXT, "uname");
    int failed = real(found);
    if (getenv("MACHINE_NAME")) snprintf(found->nodename, sizeof found->nodename, "%s", getenv("MACHINE_NAME"));
    return failed;
}
"""


def preloaded(folder: Path, **machine: str) -> dict[str, str]:
    """The environment of a process on such a machine; the library is made in `folder`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: another machine is a library that is made here")
    library, source = folder / "machine.so", folder / "machine.c"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), **machine}
