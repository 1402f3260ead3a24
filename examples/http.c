/* HTTP/1.1 as a handler that reads like the specification: a head, a body, an answer, and again
 * until one side says close. Each has a deadline as a whole: who trickles bytes gains nothing.
 *
 *     cc examples/http.c -o http
 *     ./http & curl -d hello http://127.0.0.1:8888/
 *
 * http [PORT [SECONDS]]: 8888, 0 for any free one; the deadline, 10. /large is 8 MiB of zeros.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { MAX_HEAD = 8192, MAX_BODY = 65536, LARGE = 8 << 20 };

static int64_t deadline_ms = 10000;
static char large[LARGE]; /* zeros, in one page of memory */

typedef struct request {
    char method[16], target[512];
    size_t length; /* of the body */
    int keep, expects;
} request;

/* A header field's value, cut to size; "" and 0 where there is none. */
static int field(tcpsrv_bytes head, const char *name, char *value, size_t size) {
    const char *at = head.data, *end = head.data + head.size - 2;
    size_t length = strlen(name), n = 0;
    while (at < end && (at = memchr(at, '\n', (size_t)(end - at))) != NULL) {
        if ((size_t)(end - ++at) <= length || at[length] != ':') continue;
        if (strncasecmp(at, name, length) != 0) continue;
        at += length + 1 + strspn(at + length + 1, " \t");
        while (n + 1 < size && at[n] != '\r' && at[n] != '\n') n++;
        memcpy(value, at, n);
        value[n] = 0;
        return 1;
    }
    value[0] = 0;
    return 0;
}

/* 0, or the status that refuses it. */
static int parse(tcpsrv_bytes head, request *r) {
    char line[600], value[64], minor = 0;
    size_t size = strcspn(head.data, "\r\n");
    if (size >= sizeof line) return 414;
    memcpy(line, head.data, size);
    line[size] = 0;
    if (sscanf(line, "%15s %511s HTTP/1.%c", r->method, r->target, &minor) != 3) return 400;
    if (minor != '0' && !field(head, "Host", value, sizeof value)) return 400;
    if (field(head, "Transfer-Encoding", value, sizeof value)) return 501;
    field(head, "Connection", value, sizeof value);
    r->keep = minor == '0' ? !strcasecmp(value, "keep-alive") : strcasecmp(value, "close") != 0;
    r->expects = field(head, "Expect", value, sizeof value);
    field(head, "Content-Length", value, sizeof value);
    if (value[strspn(value, "0123456789")]) return 400;
    r->length = strtoul(value, NULL, 10);
    return r->length > MAX_BODY ? 413 : 0;
}

static int answer(tcpsrv_stream *stream, int status, int keep, int with_body, tcpsrv_bytes body) {
    const char *reason = status == 200 ? "OK" : status == 408 ? "Request Timeout" : "Refused";
    time_t now = time(NULL);
    char date[64];
    int err;
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&now));
    err = tcpsrv_printf(stream, "HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: text/plain\r\n"
                        "Content-Length: %zu\r\n%s\r\n", status, reason, date, body.size,
                        keep ? "" : "Connection: close\r\n");
    return err || !with_body ? err : tcpsrv_write(stream, body.data, body.size);
}

static int refuse(tcpsrv_stream *stream, int status) {
    tcpsrv_bytes nothing = { "", 0 };
    return answer(stream, status, 0, 1, nothing);
}

/* A message that did not come: too long, too slow, or not at all. */
static int give_up(tcpsrv_stream *stream, int err) {
    tcpsrv_bytes part;
    if (err == TCPSRV_ETOOBIG) return refuse(stream, 431);
    if (err == TCPSRV_ETIMEDOUT && tcpsrv_peek(stream, &part) > 0) return refuse(stream, 408);
    return err;
}

static int serve(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes head, body;
    request r;
    char text[600];
    int err = tcpsrv_set_timeout(stream, deadline_ms, deadline_ms), status;
    (void)peer, (void)user;
    for (r.keep = 1; !err && r.keep;) {
        err = tcpsrv_read_until(stream, "\r\n\r\n", MAX_HEAD, &head);
        if (err) return give_up(stream, err);
        status = parse(head, &r);
        if (status) return refuse(stream, status);
        if (r.expects) err = tcpsrv_write(stream, "HTTP/1.1 100 Continue\r\n\r\n", 25);
        if (!err) err = tcpsrv_read_bytes(stream, r.length, &body);
        if (err) return err == TCPSRV_ETIMEDOUT ? refuse(stream, 408) : err;
        snprintf(text, sizeof text, "%s %s, %zu bytes\n", r.method, r.target, body.size);
        body.data = strcmp(r.target, "/large") == 0 ? large : text;
        body.size = body.data == large ? LARGE : strlen(text);
        err = answer(stream, 200, r.keep, strcmp(r.method, "HEAD") != 0, body);
    }
    return err;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { .handle_stream = serve };
    tcpsrv *server = tcpsrv_new(&options);
    if (argc > 2) deadline_ms = atoi(argv[2]) * 1000;
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
