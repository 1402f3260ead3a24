/* The file that the download servers send: open, and in memory. */
#ifndef SERVED_FILE_H
#define SERVED_FILE_H

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { SERVED_PIECE = 1 << 20 }; /* what is given to the kernel or the library at a time */

static struct {
    int fd;
    const char *data;
    size_t size;
} served_file;

static void open_served_file(const char *path) {
    struct stat status;
    served_file.fd = open(path, O_RDONLY | O_CLOEXEC);
    if (served_file.fd < 0 || fstat(served_file.fd, &status) != 0) {
        perror(path);
        exit(1);
    }
    served_file.size = (size_t)status.st_size;
    served_file.data = mmap(NULL, served_file.size, PROT_READ, MAP_PRIVATE | MAP_POPULATE,
                            served_file.fd, 0);
    if (served_file.data == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
}

#endif
