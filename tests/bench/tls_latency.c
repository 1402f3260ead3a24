/* How long the answers of a server take on TLS streams that are open already: each stream sends a
 * request PAUSE_MS after the answer to its last one. For tests/bench/tls.sh.
 *
 * tls_latency PORT STREAMS PAUSE_MS MS: the median, p99 and longest in ms, and how many answers
 */
#define TCPSERVER_TLS
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>

enum { MAX_STREAMS = 1000, MAX_ANSWERS = 4000000 };

static uint32_t took_us[MAX_ANSWERS];
static size_t answers;
static tcpsrv_connect_options options;
static uint64_t begin_ns, end_ns;
static int ready, streams, pause_ms, failures;

static int talk(tcpsrv_stream *stream) {
    tcpsrv_bytes answer;
    uint64_t sent = tcpsrv__clock_ns();
    int err = tcpsrv_write(stream, "GET /0\r\n\r\n", 10);
    if (!err) err = tcpsrv_read_until(stream, "\r\n\r\n", 0, &answer);
    if (!err && ready == streams && sent >= begin_ns && answers < MAX_ANSWERS)
        took_us[answers++] = (uint32_t)((tcpsrv__clock_ns() - sent) / 1000);
    return err;
}

/* The time begins when all of them are open. */
static int run(void *duration_ns) {
    tcpsrv_stream *stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
    int err;
    if (stream) tcpsrv_set_timeout(stream, 10000, 10000);
    err = stream ? talk(stream) : -1;
    if (++ready == streams) {
        begin_ns = tcpsrv__clock_ns();
        end_ns = begin_ns + *(uint64_t *)duration_ns;
    }
    while (!err && tcpsrv__clock_ns() < end_ns) {
        err = pause_ms ? tcpsrv_sleep(pause_ms) : 0;
        if (!err) err = talk(stream);
    }
    if (stream) tcpsrv_close(stream);
    failures += err != 0;
    return err;
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    static int64_t ids[MAX_STREAMS];
    tcpsrv_tls_options trust = { .no_verify = 1 };
    uint64_t duration_ns;
    int i;
    if (argc != 5) return 2;
    streams = atoi(argv[2]) < MAX_STREAMS ? atoi(argv[2]) : MAX_STREAMS;
    pause_ms = atoi(argv[3]);
    duration_ns = (uint64_t)atoi(argv[4]) * 1000000u;
    end_ns = UINT64_MAX;
    options.host = "127.0.0.1";
    options.port = atoi(argv[1]);
    options.tls = tcpsrv_tls_new(&trust);
    for (i = 0; i < streams; i++)
        ids[i] = tcpsrv_spawn(tcpsrv_loop_default(), run, &duration_ns, 0);
    for (i = 0; i < streams; i++) tcpsrv_join(ids[i]);
    if (failures || !answers) {
        fprintf(stderr, "%d streams failed: %s\n", failures, tcpsrv_last_error());
        return 1;
    }
    qsort(took_us, answers, sizeof *took_us, by_size);
    printf("%.2f %.2f %.2f %u\n", took_us[answers / 2] / 1e3, took_us[answers * 99 / 100] / 1e3,
           took_us[answers - 1] / 1e3, (unsigned)answers);
    return 0;
}
