/* A client in a straight main: outside a coroutine a waiting call runs the loop until it is done.
 * One coroutine sends at the same time, so that a peer that answers early is never kept waiting.
 *
 *     cc examples/client.c -o client
 *     printf 'hello\n' | ./client 127.0.0.1 8888
 *
 * client HOST PORT: sends its input, ends its sending side, and prints the answers to the last.
 * The host may be a name: its addresses race, and the first that answers is taken.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>

static int send_input(void *arg) {
    tcpsrv_stream *peer = arg, *input = tcpsrv_stream_from_fd(tcpsrv_loop_default(), 0);
    tcpsrv_bytes bytes;
    while (input && tcpsrv_read_some(input, 0, &bytes) == 0)
        if (tcpsrv_write(peer, bytes.data, bytes.size) != 0) break;
    if (input) tcpsrv_close(input);
    return tcpsrv_shutdown(peer);
}

/* Until the peer finishes; the flush makes a slow output hold back the peer. */
static int print_answers(tcpsrv_stream *peer, tcpsrv_stream *output) {
    tcpsrv_bytes bytes;
    int err;
    while ((err = tcpsrv_read_some(peer, 0, &bytes)) == 0) {
        err = tcpsrv_write(output, bytes.data, bytes.size);
        if (err || (err = tcpsrv_flush(output)) != 0) break;
    }
    return err == TCPSRV_EOF ? 0 : err;
}

static int talk(tcpsrv_loop *loop, const tcpsrv_connect_options *options) {
    tcpsrv_stream *output = tcpsrv_stream_from_fd(loop, 1);
    tcpsrv_stream *peer = output ? tcpsrv_connect(loop, options) : NULL;
    if (!peer || tcpsrv_spawn(loop, send_input, peer, 0) < 0) return -1;
    return print_answers(peer, output);
}

int main(int argc, char **argv) {
    tcpsrv_connect_options options = { .timeout_ms = 10000 };
    int err;
    if (argc != 3) {
        fprintf(stderr, "usage: client HOST PORT\n");
        return 1;
    }
    options.host = argv[1];
    options.port = atoi(argv[2]);
    err = talk(tcpsrv_loop_default(), &options);
    if (err) fprintf(stderr, "%s\n", tcpsrv_last_error());
    tcpsrv_loop_free(tcpsrv_loop_default());
    return err != 0;
}
