/* memory_limit: what counts, what waits while the server is at it, and that it always goes on. */
#include "test.h"

enum {
    LIMIT = 1 << 20,
    MOST = 128 << 10,               /* max_buffer_size */
    HALF = 90 << 10,                /* of a message, as clients send it */
    BOUND = LIMIT + MOST + 2 * 262144, /* the reserve, and what one receive takes beyond */
    CLIENTS = 40                    /* three times as many as the limit has room for */
};

static tcpsrv *server;
static tcpsrv_loop *loop;
static int begun, ended, full_ends;
static char log_text[512];
static int log_lines;

static void log_line(int level, const char *line, void *user) {
    (void)user;
    if (level > TCPSRV_LOG_WARNING || strstr(line, "accept paused") != line) return;
    log_lines++;
    snprintf(log_text, sizeof log_text, "%d %s", level, line);
}

/* Answers each message with its length. */
static int measure(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    begun++;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_printf(stream, "%zu\n", line.size)) != 0) break;
    full_ends += err == TCPSRV_EBUFFULL;
    ended++;
    return 0;
}

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    if (!err) err = tcpsrv_printf(stream, "%zu\n", line.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user);
    if (!err) return;
    full_ends += err == TCPSRV_EBUFFULL;
    ended++;
    tcpsrv_close(stream);
}

static int measure_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    begun++;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user);
}

static tcpsrv_options options_for(int coroutines) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    if (coroutines) options.handle_stream = measure;
    else options.on_stream = measure_callbacks;
    options.log = log_line;
    options.memory_limit = LIMIT;
    options.max_buffer_size = MOST;
    return options;
}

static void begin(const tcpsrv_options *options) {
    begun = ended = full_ends = log_lines = 0;
    loop = tcpsrv_loop_default();
    server = tcpsrv_new(options);
    CHECK(server != NULL);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
}

static void end(void) {
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void turns(int n) {
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 2), 0);
}

static tcpsrv_stats stats(void) {
    tcpsrv_stats now;
    tcpsrv_get_stats(server, &now);
    return now;
}

static int client(void) {
    return test_client(1, tcpsrv_port(server, 0));
}

/* Sends so many bytes of a message, the loop turning as long as the kernel has no room. */
static void put(int fd, size_t size) {
    static char bytes[HALF];
    memset(bytes, 'm', sizeof bytes);
    while (size) {
        ssize_t n = send(fd, bytes, size < sizeof bytes ? size : sizeof bytes,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0) size -= (size_t)n;
        else CHECK_INT(errno, EAGAIN);
        CHECK(stats().buffer_memory < BOUND);
        if (n < 0) turns(1);
    }
}

/* The answer's number, or -1: the connection has ended; -2: nothing yet. */
static int answer(int fd) {
    char text[32];
    ssize_t n = recv(fd, text, sizeof text - 1, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return -2;
    if (n <= 0) return -1;
    text[n] = 0;
    return atoi(text);
}

static int awaited(int fd) {
    int got, i;
    for (i = 0; i < 5000; i++) {
        got = answer(fd);
        if (got != -2) return got;
        turns(1);
    }
    return -2;
}

static void end_line(int fd) {
    CHECK_INT(send(fd, "\n", 1, MSG_NOSIGNAL), 1);
}

/* Half-sent messages until accepting pauses; gives how many clients there are. */
static int fill(int *fds) {
    int n;
    for (n = 0; n < CLIENTS && !stats().memory_limits; n++) {
        fds[n] = client();
        turns(3);
        put(fds[n], HALF);
        turns(10);
    }
    CHECK(n < CLIENTS);
    CHECK_INT(stats().memory_limits, 1);
    CHECK(stats().buffer_memory >= LIMIT && stats().buffer_memory < LIMIT + 262144);
    CHECK_INT(log_lines, 1);
    CHECK_STR(log_text, "1 accept paused: memory_limit is reached");
    return n;
}

static void close_all(int *fds, int n) {
    while (n > 0) close(fds[--n]);
    while (stats().active) turns(1);
    CHECK_INT(stats().buffer_memory, 0);
}

static void both(void (*body)(void)) {
    tcpsrv_options options = options_for(1);
    begin(&options);
    body();
    end();
    options = options_for(0);
    begin(&options);
    body();
    end();
}

/* ---- progress -------------------------------------------------------------------------------- */

static void wedge_body(void) {
    uint64_t until;
    int fds[CLIENTS + 1], n = fill(fds);
    fds[n] = client(); /* in the backlog */
    CHECK_INT(send(fds[n], "hello\n", 6, MSG_NOSIGNAL), 6);
    until = test_ns();
    turns(20);
    CHECK(test_ns() - until > 10000000u); /* it waits, and does not spin over the backlog */
    CHECK_INT(begun, n);
    CHECK_INT(ended, 0);
    for (until = test_ns() + 20000000000u; begun == n && test_ns() < until;) turns(1);
    CHECK_INT(awaited(fds[n]), 6);
    CHECK(full_ends >= 1 && full_ends <= n / 2);
    CHECK_INT(stats().memory_ends, full_ends);
    CHECK_INT(ended, full_ends);
    close_all(fds, n + 1);
}

static void half_sent_messages_cannot_wedge_the_server(void) {
    both(wedge_body);
}

static void oldest_body(void) {
    int fds[CLIENTS + 1], n = fill(fds), i;
    for (i = 1; i < n; i++) put(fds[i], 1000); /* there for them, but not theirs to take yet */
    put(fds[0], 20000);
    end_line(fds[0]);
    CHECK_INT(awaited(fds[0]), HALF + 20001);
    CHECK_INT(full_ends, 0);
    for (i = 1; i < n; i++) end_line(fds[i]);
    for (i = 1; i < n; i++) CHECK_INT(awaited(fds[i]), HALF + 1001);
    CHECK_INT(full_ends, 0);
    CHECK_INT(ended, 0);
    close_all(fds, n);
}

static void the_oldest_waiting_message_may_go_on_and_then_the_others(void) {
    both(oldest_body);
}

/* The oldest sends one message after another, as fast as they are taken. */
static void pipeline_body(void) {
    static char lines[60000];
    int fds[CLIENTS], n = fill(fds), i, got = -2;
    memset(lines, 'p', sizeof lines);
    for (i = 999; i < (int)sizeof lines; i += 1000) lines[i] = '\n';
    put(fds[1], 1000);
    end_line(fds[1]);
    for (i = 0; i < 5000 && got == -2; i++) {
        char answers[4096];
        if (send(fds[0], lines, sizeof lines, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            CHECK_INT(errno, EAGAIN);
        while (recv(fds[0], answers, sizeof answers, MSG_DONTWAIT) > 0) continue;
        turns(1);
        got = answer(fds[1]);
    }
    CHECK_INT(got, HALF + 1001);
    CHECK_INT(full_ends, 0);
    close_all(fds, n);
}

static void who_sends_on_and_on_does_not_keep_others_waiting(void) {
    both(pipeline_body);
}

static void the_read_that_holds_most_ends(void) {
    tcpsrv_options options = options_for(1);
    int fds[CLIENTS], n, i;
    begin(&options);
    for (n = 0; n < CLIENTS && !stats().memory_limits; n++) {
        fds[n] = client();
        turns(3);
        put(fds[n], n == 3 ? MOST - 100 : 40000);
        turns(10);
    }
    CHECK_INT(ended, 0);
    CHECK_INT(awaited(fds[3]), -1);
    for (i = 0; i < n; i++) CHECK_INT(answer(fds[i]), i == 3 ? -1 : -2);
    close_all(fds, n);
    end();
}

static void with_an_eighth_free_all_goes_on_at_once(void) {
    tcpsrv_options options = options_for(1);
    int fds[CLIENTS], n, i;
    begin(&options);
    n = fill(fds);
    CHECK(server->owner.full);
    for (i = 0; i < 3; i++) close(fds[i]);
    turns(30);
    CHECK(!server->owner.full);
    CHECK(stats().buffer_memory < LIMIT);
    CHECK_INT(full_ends, 0);
    close_all(fds + 3, n - 3);
    end();
}

/* All send whole messages at once, several times what the server may hold, one after another. */
static void crowd_body(void) {
    enum { ROUNDS = 3, SIZE = 100000 };
    static char line[SIZE];
    size_t sent[CLIENTS];
    int fds[CLIENTS], got[CLIENTS], i, left = CLIENTS * ROUNDS;
    uint64_t until = test_ns() + 25000000000u, most = 0;
    memset(line, 'm', sizeof line);
    line[SIZE - 1] = '\n';
    for (i = 0; i < CLIENTS; i++) {
        fds[i] = client();
        sent[i] = 0;
        got[i] = 0;
    }
    while (left && test_ns() < until) {
        for (i = 0; i < CLIENTS; i++) {
            ssize_t n = sent[i] < ROUNDS * SIZE
                            ? send(fds[i], line + sent[i] % SIZE, SIZE - sent[i] % SIZE,
                                   MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
            char text[64];
            if (n > 0) sent[i] += (size_t)n;
            n = recv(fds[i], text, sizeof text, MSG_DONTWAIT);
            CHECK(n != 0);
            for (; n > 0; n--)
                if (text[n - 1] == '\n') got[i]++, left--;
        }
        if (stats().buffer_memory > most) most = stats().buffer_memory;
        turns(1);
    }
    if (getenv("TEST_VERBOSE")) printf("    at most %d bytes\n", (int)most);
    CHECK(most < BOUND);
    for (i = 0; i < CLIENTS; i++) CHECK_INT(got[i], ROUNDS);
    CHECK(stats().memory_limits >= 1);
    CHECK_INT(full_ends, 0);
    CHECK_INT(ended, 0);
    close_all(fds, CLIENTS);
}

static void a_crowd_that_sends_more_than_fits_is_served_to_the_last(void) {
    both(crowd_body);
}

static void idle_streams_wait_and_are_then_served(void) {
    tcpsrv_options options = options_for(1);
    int fds[CLIENTS + 1], idle, n;
    begin(&options);
    idle = client();
    CHECK_INT(send(idle, "one\n", 4, MSG_NOSIGNAL), 4);
    CHECK_INT(awaited(idle), 4);
    n = fill(fds);
    CHECK_INT(send(idle, "three\n", 6, MSG_NOSIGNAL), 6);
    turns(50);
    CHECK_INT(answer(idle), -2);
    close(fds[0]);
    close(fds[1]);
    close(fds[2]);
    while (n > 3) close(fds[--n]);
    CHECK_INT(awaited(idle), 6);
    CHECK_INT(full_ends, 0);
    close_all(&idle, 1);
    end();
}

static void keep(tcpsrv_stream *stream, void *arg) {
    *(tcpsrv_stream **)arg = stream;
}

static void who_waits_for_the_server_is_not_idle(void) {
    tcpsrv_options options = options_for(1);
    tcpsrv_stream *stream = NULL;
    int fds[CLIENTS], waits, n;
    options.idle_timeout_ms = 100000;
    begin(&options);
    waits = client();
    CHECK_INT(send(waits, "one\n", 4, MSG_NOSIGNAL), 4);
    CHECK_INT(awaited(waits), 4);
    tcpsrv_foreach(server, keep, &stream);
    n = fill(fds);
    CHECK_INT(send(waits, "three\n", 6, MSG_NOSIGNAL), 6);
    turns(20);
    stream->extra->active = loop->now - stream->owner->idle_ns; /* as if that time had passed */
    CHECK_INT(tcpsrv__alarm_arm(stream), 0);
    turns(20);
    CHECK_INT(answer(waits), -2);
    while (n > 0) close(fds[--n]);
    CHECK_INT(awaited(waits), 6);
    CHECK_INT(stats().timeouts_idle, 0);
    close_all(&waits, 1);
    end();
}

/* ---- what counts ----------------------------------------------------------------------------- */

static void small_requests_do_not_touch_the_counter(void) {
    tcpsrv_options options = options_for(1);
    int fd, i;
    begin(&options);
    fd = client();
    for (i = 0; i < 100; i++) {
        CHECK_INT(send(fd, "hi\n", 3, MSG_NOSIGNAL), 3);
        CHECK_INT(awaited(fd), 3);
        CHECK_INT(stats().buffer_memory, 0);
    }
    close_all(&fd, 1);
    end();
}

static int blast(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    static char bytes[4000];
    int err = 0;
    (void)peer, (void)user;
    begun++;
    while (!err) err = tcpsrv_write(stream, bytes, sizeof bytes);
    ended++;
    return err;
}

static void output_that_a_peer_does_not_take_counts(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.handle_stream = blast;
    begin(&options);
    fd = client();
    while (!stats().buffer_memory) turns(1);
    turns(20);
    CHECK(stats().buffer_memory < 3 * 65536);
    close_all(&fd, 1);
    CHECK_INT(ended, 1);
    end();
}

static int dozes;

static int doze(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err = tcpsrv_read_until(stream, "\n", 0, &line);
    (void)peer, (void)user;
    dozes++;
    while (!err && dozes) err = tcpsrv_sleep(2);
    return err ? err : tcpsrv_read_some(stream, 0, &line);
}

/* A message that a handler looks at, waiting for something else. */
static void what_a_handler_looks_at_counts_until_its_next_read(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.handle_stream = doze;
    dozes = 0;
    begin(&options);
    fd = client();
    put(fd, 50000);
    end_line(fd);
    while (!dozes) turns(1);
    CHECK(stats().buffer_memory >= 50000);
    CHECK(stats().buffer_memory <= 4 * 50000 + 512);
    dozes = 0;
    while (stats().buffer_memory) turns(1);
    close_all(&fd, 1);
    end();
}

/* Bytes that come in one piece: a message that is looked at, and what lies behind it. */
static void in_one_piece(size_t message, size_t behind) {
    static char bytes[60000];
    tcpsrv_options options = options_for(1);
    int fd;
    options.handle_stream = doze;
    dozes = 0;
    begin(&options);
    memset(bytes, 'b', sizeof bytes);
    bytes[message - 1] = '\n';
    fd = client();
    CHECK_INT(send(fd, bytes, message + behind, MSG_NOSIGNAL), (int)(message + behind));
    while (!dozes) turns(1);
    turns(3);
    CHECK(stats().buffer_memory >= message + behind);
    CHECK(stats().buffer_memory <= 4 * (message + behind) + 512);
    dozes = 0;
    shutdown(fd, SHUT_WR);
    while (stats().active) turns(1);
    close_all(&fd, 1);
    end();
}

static void what_came_in_one_piece_counts_while_it_is_kept(void) {
    in_one_piece(5000, 0);
    in_one_piece(5000, 40000);
    in_one_piece(50000, 0);
}

enum { WARM = 3 };              /* messages by which the stream gets used to their size */
enum { READS, SLEEPS, THINKS }; /* THINKS: about a message that was too big for its read */
static int then;

static int doze_later(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int i, err = 0;
    for (i = 0; i < WARM && !err; i++) {
        err = tcpsrv_read_until(stream, "\n", 0, &line);
        if (!err) err = tcpsrv_write(stream, "1\n", 2);
    }
    if (!err && then != READS) err = tcpsrv_sleep(100);
    if (!err && then == THINKS) {
        CHECK_INT(tcpsrv_read_until(stream, "\n", 10, &line), TCPSRV_ETOOBIG);
        for (dozes++; !err && dozes;) err = tcpsrv_sleep(2);
        return err;
    }
    return err ? err : doze(stream, peer, user);
}

static void after_others(int what) {
    static char bytes[5000];
    tcpsrv_options options = options_for(1);
    int fd, i;
    options.handle_stream = doze_later;
    dozes = 0;
    then = what;
    begin(&options);
    memset(bytes, 'b', sizeof bytes);
    bytes[sizeof bytes - 1] = '\n';
    fd = client();
    for (i = 0; i <= WARM; i++) {
        CHECK_INT(send(fd, bytes, sizeof bytes, MSG_NOSIGNAL), (int)sizeof bytes);
        if (i < WARM) CHECK_INT(awaited(fd), 1);
    }
    while (!dozes) turns(1);
    CHECK(stats().buffer_memory >= sizeof bytes);
    CHECK(stats().buffer_memory <= 4 * sizeof bytes + 512);
    dozes = 0;
    shutdown(fd, SHUT_WR);
    while (stats().active) turns(1);
    close_all(&fd, 1);
    end();
}

static void a_message_served_straight_counts_while_it_is_looked_at(void) {
    after_others(READS);
}

static void a_message_that_was_there_before_its_read_counts(void) {
    after_others(SLEEPS);
}

static void a_message_that_is_too_big_counts_while_it_is_kept(void) {
    after_others(THINKS);
}

/* A line with the size of what follows it. */
static int measure_framed(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes bytes;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &bytes)) == 0) {
        err = tcpsrv_read_bytes(stream, (size_t)atoi(bytes.data), &bytes);
        if (!err) err = tcpsrv_write(stream, bytes.size == 4000 ? "4000\n" : "0\n", 5);
        if (err) break;
    }
    return err;
}

static void nothing_is_counted_while_a_stream_waits_for_its_next_message(void) {
    static char bytes[4005];
    tcpsrv_options options = options_for(1);
    int fd, i;
    options.handle_stream = measure_framed;
    begin(&options);
    memset(bytes, 'b', sizeof bytes);
    memcpy(bytes, "4000\n", 5);
    fd = client();
    for (i = 0; i < 6; i++) {
        CHECK_INT(send(fd, bytes, sizeof bytes, MSG_NOSIGNAL), (int)sizeof bytes);
        CHECK_INT(awaited(fd), 4000);
        turns(2);
        CHECK_INT(stats().buffer_memory, 0);
    }
    close_all(&fd, 1);
    end();
}

static void without_the_limit_memory_is_counted_all_the_same(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.memory_limit = 0;
    begin(&options);
    fd = client();
    put(fd, HALF);
    turns(10);
    CHECK(stats().buffer_memory >= HALF && stats().buffer_memory < 4 * HALF + 512);
    CHECK_INT(stats().memory_limits, 0);
    close_all(&fd, 1);
    end();
}

static void a_server_at_its_limit_may_end_in_any_way(void) {
    tcpsrv_options options = options_for(1);
    int fds[CLIENTS], n, way;
    for (way = 0; way < 3; way++) {
        begin(&options);
        n = fill(fds);
        if (way == 0) tcpsrv_free(server);
        CHECK_INT(way < 2 ? tcpsrv_loop_free(loop) : 0, 0);
        if (way == 1) tcpsrv_free(server);
        if (way == 2) {
            tcpsrv_drain(server, 100);
            while (stats().active) turns(1);
            end();
        }
        while (n > 0) close(fds[--n]);
    }
}

/* What each request of a coroutine touches, without a line that it only shares. */
static void a_coroutines_stream_and_its_bytes_begin_where_cache_lines_do(void) {
#if defined(TCPSRV__CORO_X86_64) && TCPSRV__INLINE_SWITCH && defined(__LP64__)
    size_t bytes = sizeof(tcpsrv__co) + offsetof(tcpsrv__hosted, home_bytes);
    CHECK_INT(bytes % 64, 0);
    CHECK_INT(offsetof(tcpsrv__co, waiter) / 64, (sizeof(tcpsrv__co) - 1) / 64);
#endif
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(half_sent_messages_cannot_wedge_the_server),
        TEST(the_oldest_waiting_message_may_go_on_and_then_the_others),
        TEST(who_sends_on_and_on_does_not_keep_others_waiting),
        TEST(the_read_that_holds_most_ends),
        TEST(with_an_eighth_free_all_goes_on_at_once),
        TEST(a_crowd_that_sends_more_than_fits_is_served_to_the_last),
        TEST(idle_streams_wait_and_are_then_served),
        TEST(who_waits_for_the_server_is_not_idle),
        TEST(small_requests_do_not_touch_the_counter),
        TEST(output_that_a_peer_does_not_take_counts),
        TEST(what_a_handler_looks_at_counts_until_its_next_read),
        TEST(what_came_in_one_piece_counts_while_it_is_kept),
        TEST(a_message_served_straight_counts_while_it_is_looked_at),
        TEST(a_message_that_was_there_before_its_read_counts),
        TEST(a_message_that_is_too_big_counts_while_it_is_kept),
        TEST(nothing_is_counted_while_a_stream_waits_for_its_next_message),
        TEST(without_the_limit_memory_is_counted_all_the_same),
        TEST(a_server_at_its_limit_may_end_in_any_way),
        TEST(a_coroutines_stream_and_its_bytes_begin_where_cache_lines_do),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
