/* The line echo server over TLS with callbacks: its connections have no stacks.
 *
 * tls_callbacks PORT CERTIFICATE KEY
 */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    if (!err) err = tcpsrv_write(stream, line.data, line.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, arg);
    if (err) tcpsrv_close(stream);
}

static int begin(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, NULL);
}

int main(int argc, char **argv) {
    tcpsrv_certificate own = { .certificate_file = argc == 4 ? argv[2] : NULL,
                               .key_file = argc == 4 ? argv[3] : NULL };
    tcpsrv_tls *tls = tcpsrv_tls_new(&(tcpsrv_tls_options){ .certificates = &own,
                                                            .certificate_count = 1 });
    tcpsrv_options options = { .on_stream = begin, .tls = tls };
    tcpsrv *server = tls ? tcpsrv_new(&options) : NULL;
    if (!server || tcpsrv_listen(server, atoi(argv[1]), "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
