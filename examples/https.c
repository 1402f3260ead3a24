/* One page over HTTPS: keep-alive, the protocol agreed on by ALPN, and what TLS says of the client
 * in the page. At SIGHUP the certificate is read again, for connections from then on.
 *
 *     cc examples/https.c -o https -lbearssl
 *     make certs && ./https & curl -k https://127.0.0.1:8443/
 *
 * https [PORT [CERTIFICATE [KEY]]]: 8443, 0 for any free one; the files that make certs made.
 */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static tcpsrv_certificate own = { .certificate_file = "build/certificate.pem",
                                  .key_file = "build/key.pem" };
static tcpsrv *server;

static tcpsrv_tls *load(void) {
    static const char *const protocols[] = { "http/1.1", NULL };
    tcpsrv_tls_options options = { .certificates = &own, .certificate_count = 1,
                                   .alpn = protocols };
    return tcpsrv_tls_new(&options);
}

static void reload(int signo, void *arg) {
    tcpsrv_tls *tls = load();
    (void)signo;
    (void)arg;
    if (!tls || tcpsrv_set_tls(server, tls) != 0)
        fprintf(stderr, "%s; the old certificate stays\n", tcpsrv_last_error());
    tcpsrv_tls_free(tls); /* the server keeps what it uses */
}

static int page(tcpsrv_stream *stream, const tcpsrv_tls_info *info, int has_body) {
    char body[1024];
    int size = snprintf(body, sizeof body, "<!doctype html><title>tcpserver.h</title>"
                        "<p>Hello over %s.<p>Suite: %s<p>Server name: %.100s<p>ALPN: %s"
                        "<p>Session: %s\n", info->version, info->suite,
                        strpbrk(info->server_name, "<>&") ? "?" : info->server_name, info->alpn,
                        info->resumed ? "resumed" : "new");
    return tcpsrv_printf(stream, "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
                         "Content-Length: %d\r\nStrict-Transport-Security: max-age=31536000\r\n"
                         "\r\n%s", size, has_body ? body : "");
}

static int serve(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_tls_info info;
    tcpsrv_bytes head;
    int err = tcpsrv_wait_handshake(stream);
    (void)peer;
    (void)user;
    if (err || tcpsrv_get_tls_info(stream, &info) != 0) return err;
    while ((err = tcpsrv_read_until(stream, "\r\n\r\n", 8192, &head)) == 0) {
        if (memcmp(head.data, "GET ", 4) != 0 && memcmp(head.data, "HEAD", 4) != 0)
            return tcpsrv_printf(stream, "HTTP/1.1 405 Method Not Allowed\r\n"
                                 "Content-Length: 0\r\nConnection: close\r\n\r\n");
        if ((err = page(stream, &info, head.data[0] == 'G')) != 0) break;
    }
    return err;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .handle_stream = serve };
    if (argc > 2) own.certificate_file = argv[2];
    if (argc > 3) own.key_file = argv[3];
    options.tls = load();
    server = options.tls ? tcpsrv_new(&options) : NULL;
    tcpsrv_tls_free(options.tls);
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8443, "127.0.0.1") != 0 ||
        tcpsrv_on_signal(tcpsrv_loop_default(), SIGHUP, reload, NULL) < 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
