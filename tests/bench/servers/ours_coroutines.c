/* The echo server as a user would write it with coroutines.
 *
 * ours_coroutines PORT [line|timed|chunk|once|file FILE|write FILE]: as ours_callbacks.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../../../tcpserver.h"
#include "served_file.h"
#include <stdio.h>

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

static int echo_chunks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes chunk;
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_some(stream, 0, &chunk)) == 0)
        if ((err = tcpsrv_write(stream, chunk.data, chunk.size)) != 0) break;
    return err;
}

static int echo_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err = tcpsrv_read_until(stream, "\n", 0, &line);
    (void)peer;
    (void)user;
    return err ? err : tcpsrv_write(stream, line.data, line.size);
}

static int serve_file(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, NULL)) == 0)
        if ((err = tcpsrv_sendfile(stream, served_file.fd, 0, served_file.size)) != 0) break;
    return err;
}

static int serve_bytes(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int err;
    (void)peer;
    (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, NULL)) == 0)
        if ((err = tcpsrv_write(stream, served_file.data, served_file.size)) != 0) break;
    return err;
}

static tcpsrv_stream_fn *handler_of(const char *mode) {
    if (strcmp(mode, "chunk") == 0) return echo_chunks;
    if (strcmp(mode, "once") == 0) return echo_once;
    if (strcmp(mode, "file") == 0) return serve_file;
    if (strcmp(mode, "write") == 0) return serve_bytes;
    return echo;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { 0 };
    tcpsrv *server;
    if (argc < 2) return 2;
    options.handle_stream = handler_of(argc > 2 ? argv[2] : "line");
    if (argc > 2 && strcmp(argv[2], "timed") == 0) options.idle_timeout_ms = 60000;
    if (argc > 3) open_served_file(argv[3]);
    server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, atoi(argv[1]), "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
