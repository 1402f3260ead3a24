/* The server: accepting, limits, stopping, draining, and what becomes of its streams. */
#include "support.h"
#include <sys/uio.h>
static int receives, receives_before_shutdown;
#define read(fd, data, size) (receives++, read(fd, data, size))
#define readv(fd, pieces, count) (receives++, readv(fd, pieces, count))
#define recv(fd, data, size, flags) (receives++, recv(fd, data, size, flags))
#define shutdown(fd, how) (receives_before_shutdown = receives, shutdown(fd, how))
#include "test.h"
#undef recv
#undef shutdown

static tcpsrv *server;
static tcpsrv_loop *loop;
static int handled, ended;
static char log_text[512];
static int log_lines;

static void log_line(int level, const char *line, void *user) {
    (void)user;
    log_lines++;
    snprintf(log_text, sizeof log_text, "%d %s", level, line);
}

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)user;
    handled++;
    CHECK_INT(peer->family, AF_INET);
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    ended++;
    return err;
}

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    if (err || tcpsrv_write(stream, line.data, line.size) != 0) {
        ended++;
        tcpsrv_close(stream);
        return;
    }
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user), 0);
}

static int echo_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    handled++;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, user);
}

static tcpsrv_options options_for(int coroutines) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    if (coroutines) options.handle_stream = echo;
    else options.on_stream = echo_callbacks;
    options.log = log_line;
    return options;
}

static void begin(const tcpsrv_options *options) {
    handled = ended = log_lines = 0;
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
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
}

/* A blocking client; its reads time out, so that a silent server fails the test. */
static int client(int port) {
    struct timeval limit = { 5, 0 };
    int fd = test_client(1, port);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
}

static void ask(int fd, const char *line) {
    CHECK_INT(send(fd, line, strlen(line), MSG_NOSIGNAL), (int)strlen(line));
}

/* Turns the loop until the client has so many bytes, or the connection's end. */
static ssize_t take(int fd, char *bytes, size_t size) {
    size_t got = 0;
    int i;
    for (i = 0; i < 500 && got < size; i++) {
        ssize_t n = recv(fd, bytes + got, size - got, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
        if (n > 0) got += (size_t)n;
        else turns(1);
    }
    return (ssize_t)got;
}

static void expect(int fd, const char *text) {
    char bytes[2000];
    CHECK_INT(take(fd, bytes, strlen(text)), (int)strlen(text));
    CHECK_MEM(bytes, strlen(text), text);
}

static int at_end(int fd) {
    char byte;
    int i;
    for (i = 0; i < 500; i++) {
        ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return n == 0 ? 1 : -errno;
        turns(1);
    }
    return 0;
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

static void serve_body(void) {
    int a = client(tcpsrv_port(server, 0)), b = client(tcpsrv_port(server, 0));
    ask(a, "one\ntwo\n");
    ask(b, "three\n");
    expect(b, "three\n");
    expect(a, "one\ntwo\n");
    shutdown(a, SHUT_WR);
    CHECK_INT(at_end(a), 1);
    close(a);
    close(b);
    turns(4);
    CHECK_INT(handled, 2);
    CHECK_INT(ended, 2);
}

static void connections_are_served_side_by_side(void) {
    both(serve_body);
}

static size_t active(void) {
    tcpsrv_stats stats;
    tcpsrv_get_stats(server, &stats);
    return stats.active;
}

/* The peer's end is told, answered and done with in one turn, and no other is due after it. */
static void end_body(void) {
    int fd = client(tcpsrv_port(server, 0)), i;
    receives = 0;
    for (i = 0; i < 500 && !handled; i++) turns(1);
    CHECK_INT(receives, 1); /* at once, as the first message often is there */
    ask(fd, "one\n");
    expect(fd, "one\n");
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    close(fd);
    for (i = 0; i < 500 && !ended; i++) turns(1);
    CHECK_INT(active(), 0);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
}

static void a_connection_ends_in_the_turn_that_tells_of_it(void) {
    both(end_body);
}

static int answer_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    (void)peer, (void)user;
    if (tcpsrv_read_until(stream, "\n", 0, &line) == 0)
        CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
    ended++;
    return 0;
}

static void on_only_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    (void)user;
    if (!err) CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
    tcpsrv_close(stream);
    ended++;
}

static int answer_once_by_callback(tcpsrv_stream *stream, const tcpsrv_address *peer,
                                   void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_only_line, user);
}

static void end_by_server(const tcpsrv_options *options) {
    int fd, i;
    begin(options);
    fd = client(tcpsrv_port(server, 0));
    ask(fd, "one\n");
    for (i = 0; i < 500 && !ended; i++) turns(1);
    CHECK(tcpsrv_loop_timeout(loop) > 0); /* until the peer is waited for no more */
    CHECK_INT(receives, receives_before_shutdown);
    expect(fd, "one\n");
    CHECK_INT(at_end(fd), 1);
    CHECK_INT(active(), 1);
    CHECK_INT(receives, receives_before_shutdown);
    close(fd);
    for (i = 0; i < 500 && active(); i++) turns(1);
    CHECK_INT(receives, receives_before_shutdown + 1);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    end();
}

static void after_its_own_end_a_server_receives_when_the_peer_has_answered(void) {
    tcpsrv_options options = options_for(0);
    options.on_stream = answer_once_by_callback;
    end_by_server(&options);
    options = options_for(1);
    options.handle_stream = answer_once;
    end_by_server(&options);
}

static void parts_body(void) {
    static const char *const parts[] = { "o", "ne\n", "a line", " in parts\n", "x\ny", "\n" };
    int fd = client(tcpsrv_port(server, 0));
    size_t i;
    for (i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        turns(2);
        ask(fd, parts[i]);
        turns(2);
        if (i % 2) expect(fd, i == 1 ? "one\n" : i == 3 ? "a line in parts\n" : "x\ny\n");
    }
    close(fd);
}

/* Into memory that nothing was in before: valgrind says whether it is looked at. */
static void nothing_hangs_on_what_lies_behind_a_part_of_a_line(void) {
    both(parts_body);
}

static void options_report_every_default(void) {
    tcpsrv_options zero = options_for(1);
    const tcpsrv_options *full;
    server = tcpsrv_new(&zero);
    full = tcpsrv_get_options(server);
    CHECK_INT(full->max_buffer_size, 1 << 20);
    CHECK_INT(full->max_write_buffer_size, 1 << 20);
    CHECK_INT(full->write_high_water, 65536);
    CHECK_INT(full->read_chunk_size, 65536);
    CHECK_INT(full->close_timeout_ms, 5000);
    CHECK_INT(full->handshake_timeout_ms, 10000);
    CHECK(full->stack_size >= 65536 && full->max_connections > 0);
    CHECK_INT(full->idle_timeout_ms, 0);
    tcpsrv_free(server);
    zero.on_stream = echo_callbacks;
    CHECK(tcpsrv_new(&zero) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "one of handle_stream and on_stream") != NULL);
    zero.on_stream = zero.handle_stream = NULL;
    CHECK(tcpsrv_new(&zero) == NULL);
}

static void stopping_twice_and_listening_again_work(void) {
    tcpsrv_options options = options_for(1);
    int fd, open;
    begin(&options);
    open = client(tcpsrv_port(server, 0));
    ask(open, "x\n");
    expect(open, "x\n");
    tcpsrv_stop(server);
    tcpsrv_stop(server);
    CHECK_INT(tcpsrv_port(server, 0), -ENOENT);
    ask(open, "still\n");
    expect(open, "still\n");
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    fd = client(tcpsrv_port(server, 1));
    ask(fd, "again\n");
    expect(fd, "again\n");
    close(fd);
    close(open);
    end();
}

static int stop_at_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)stream, (void)peer, (void)user;
    handled++;
    tcpsrv_stop(server);
    return 0;
}

static void a_handler_may_stop_the_server_in_the_middle_of_a_batch(void) {
    tcpsrv_options options = options_for(1);
    int fds[20], i;
    options.handle_stream = stop_at_once;
    begin(&options);
    for (i = 0; i < 20; i++) fds[i] = client(tcpsrv_port(server, 0));
    turns(5);
    CHECK_INT(handled, 1);
    for (i = 0; i < 20; i++) close(fds[i]);
    turns(2);
    end();
}

static int free_at_once(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes bytes;
    (void)peer, (void)user;
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_read_some(stream, 0, &bytes), TCPSRV_ECLOSED);
    ended++;
    return 0;
}

static void a_handler_may_free_the_server(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.handle_stream = free_at_once;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    turns(5);
    CHECK_INT(ended, 1);
    CHECK(at_end(fd) != 0);
    close(fd);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void freeing_with_parked_handlers_ends_them(void) {
    tcpsrv_options options = options_for(1);
    int fds[3], i;
    begin(&options);
    for (i = 0; i < 3; i++) fds[i] = client(tcpsrv_port(server, 0));
    turns(5);
    CHECK_INT(handled, 3);
    tcpsrv_free(server);
    turns(3);
    CHECK_INT(ended, 3);
    for (i = 0; i < 3; i++) close(fds[i]);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void freeing_the_loop_ends_handlers_and_the_server_goes_after_it(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    turns(3);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    CHECK_INT(ended, 1);
    tcpsrv_free(server);
    close(fd);
}

static void limit_body(void) {
    int fds[6], i;
    for (i = 0; i < 6; i++) {
        fds[i] = client(tcpsrv_port(server, 0));
        ask(fds[i], "hello\n");
    }
    turns(10);
    CHECK_INT(handled, 2);
    for (i = 0; i < 6; i++) {
        expect(fds[i], "hello\n");
        close(fds[i]);
    }
    turns(10);
    CHECK_INT(handled, 6);
    CHECK_INT(ended, 6);
}

static void at_max_connections_others_wait_in_the_backlog_and_are_served_later(void) {
    tcpsrv_options options = options_for(1);
    tcpsrv_stats stats;
    options.max_connections = 2;
    begin(&options);
    limit_body();
    tcpsrv_get_stats(server, &stats);
    CHECK_INT(stats.accepted, 6);
    CHECK_INT(stats.active, 0);
    CHECK(stats.accept_pauses > 0);
    end();
}

static double cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec / 1e6 +
           (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec / 1e6;
}

/* The clients are another process, whose descriptors are its own. */
static pid_t crowd(int port, int count, int seconds) {
    pid_t pid = fork();
    int i;
    if (pid != 0) return pid;
    for (i = 0; i < count; i++) client(port);
    test_sleep_ms(seconds * 1000);
    _exit(0);
    return pid; /* not reached, which some compilers do not see */
}

static void without_descriptors_accepting_pauses_and_resumes(void) {
    tcpsrv_options options = options_for(1);
    struct rlimit limit;
    tcpsrv_stats stats;
    uint64_t until;
    double cpu;
    int turns_made = 0, fd;
    int64_t longest = 0;
    pid_t pid;
    options.max_connections = 1000;
    begin(&options);
    pid = crowd(tcpsrv_port(server, 0), 60, 2);
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = 24;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    cpu = cpu_seconds();
    for (until = test_ns() + 1500000000u; test_ns() < until; turns_made++) {
        CHECK_INT(tcpsrv_loop_poll(loop, 100), 0);
        if (server->pause_ms > longest) longest = server->pause_ms;
    }
    CHECK(longest >= 4 * TCPSRV__PAUSE_MS);
    CHECK(cpu_seconds() - cpu < 0.5);
    CHECK(turns_made < 300);
    CHECK(log_lines >= 1 && log_lines <= 4);
    CHECK(strstr(log_text, "Too many open files") != NULL);
    tcpsrv_get_stats(server, &stats);
    CHECK(stats.accept_pauses >= 3 && stats.accept_pauses < 20);
    CHECK(stats.shed > TCPSRV__SHED); /* a few at each pause */
    waitpid(pid, NULL, 0);
    limit.rlim_cur = limit.rlim_max;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    fd = client(tcpsrv_port(server, 0));
    ask(fd, "served again\n");
    expect(fd, "served again\n");
    close(fd);
    end();
}

static int fail_with(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)stream, (void)peer;
    return *(int *)user;
}

static void results_of_handlers_are_logged_with_the_peer(void) {
    static const int codes[] = { 0, TCPSRV_EOF, TCPSRV_ECLOSED, TCPSRV_ECANCELED, -ECONNRESET,
                                 -EPROTO };
    static const int levels[] = { -1, -1, -1, -1, TCPSRV_LOG_DEBUG, TCPSRV_LOG_ERROR };
    tcpsrv_options options = options_for(1);
    int result, i, fd;
    options.handle_stream = fail_with;
    options.user = &result;
    begin(&options);
    for (i = 0; i < 6; i++) {
        result = codes[i];
        log_lines = 0;
        fd = client(tcpsrv_port(server, 0));
        CHECK_INT(at_end(fd), 1);
        close(fd);
        CHECK_INT(log_lines, levels[i] >= 0);
        if (levels[i] >= 0) CHECK_INT(log_text[0] - '0', levels[i]);
    }
    CHECK(strstr(log_text, "connection from 127.0.0.1:") != NULL);
    CHECK(strstr(log_text, "Protocol error") != NULL);
    end();
}

static void idle_body(void) {
    int fd = client(tcpsrv_port(server, 0)), i;
    tcpsrv_stats stats;
    for (i = 0; i < 7; i++) {
        test_sleep_ms(25);
        ask(fd, "busy\n");
        expect(fd, "busy\n");
    }
    for (i = 0; i < 7; i++) { /* nor one that sends byte by byte */
        test_sleep_ms(25);
        ask(fd, i < 6 ? "b" : "\n");
        turns(1);
    }
    expect(fd, "bbbbbb\n");
    CHECK(at_end(fd) != 0);
    tcpsrv_get_stats(server, &stats);
    CHECK_INT(stats.timeouts_idle, 1);
    close(fd);
}

static void an_idle_connection_ends_and_a_busy_one_does_not(void) {
    tcpsrv_options options = options_for(1);
    options.idle_timeout_ms = 60;
    begin(&options);
    idle_body();
    end();
    options = options_for(0);
    options.idle_timeout_ms = 60;
    begin(&options);
    idle_body();
    end();
}

static int drained;

static void on_drained(tcpsrv *which, void *user) {
    (void)user;
    CHECK(which == server);
    drained++;
}

static void draining_ends_idle_reads_and_lets_half_messages_finish(void) {
    tcpsrv_options options = options_for(1);
    int idle, half, stuck;
    options.on_drained = on_drained;
    begin(&options);
    idle = client(tcpsrv_port(server, 0));
    half = client(tcpsrv_port(server, 0));
    stuck = client(tcpsrv_port(server, 0));
    ask(idle, "done\n");
    expect(idle, "done\n");
    ask(half, "hal");
    ask(stuck, "never");
    turns(5);
    tcpsrv_drain(server, 300);
    CHECK_INT(tcpsrv_draining(server), 1);
    CHECK_INT(at_end(idle), 1);
    ask(half, "f\n");
    expect(half, "half\n");
    CHECK_INT(at_end(half), 1);
    close(idle);
    close(half);
    CHECK_INT(drained, 0);
    CHECK(at_end(stuck) != 0);
    turns(5);
    CHECK_INT(drained, 1);
    close(stuck);
    end();
}

/* What was called off aborts nobody at its time. */
static void a_server_that_listens_again_has_no_drain_to_come(void) {
    tcpsrv_options options = options_for(0);
    int fd, i;
    options.on_drained = on_drained;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    ask(fd, "one\n");
    expect(fd, "one\n");
    drained = 0;
    tcpsrv_drain(server, 20);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    CHECK_INT(tcpsrv_draining(server), 0);
    for (i = 0; i < 20; i++) {
        test_sleep_ms(5);
        turns(1);
    }
    ask(fd, "two\n");
    expect(fd, "two\n");
    CHECK_INT(drained, 0);
    close(fd);
    end();
}

static void a_drain_answers_the_first_message_that_is_on_its_way(void) {
    tcpsrv_options options = options_for(1);
    int coming, silent;
    options.on_drained = on_drained;
    begin(&options);
    coming = client(tcpsrv_port(server, 0));
    silent = client(tcpsrv_port(server, 0));
    turns(5);
    tcpsrv_drain(server, 20000);
    turns(5);
    ask(coming, "first\n");
    expect(coming, "first\n");
    CHECK_INT(at_end(coming), 1);
    CHECK_INT(drained, 0);
    CHECK_INT(at_end(silent), 1); /* after a second, not twenty */
    close(coming);
    close(silent);
    turns(5);
    CHECK_INT(drained, 1);
    end();
}

static void a_drain_answers_what_is_in_the_kernel_already(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.on_drained = on_drained;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    ask(fd, "first\n");
    expect(fd, "first\n");
    ask(fd, "second\n");
    tcpsrv_drain(server, 20000);
    expect(fd, "second\n");
    CHECK_INT(at_end(fd), 1);
    close(fd);
    turns(5);
    CHECK_INT(drained, 1);
    end();
}

static void stop_both(void *other) {
    tcpsrv_drain((tcpsrv *)other, 20000);
    tcpsrv_drain(server, 20000);
}

static void finish_late(void *fd) {
    ask(*(int *)fd, "f\n");
}

static void the_last_server_to_drain_stops_the_loop(void) {
    tcpsrv_options options = options_for(1);
    tcpsrv *other = tcpsrv_new(&options);
    int fd;
    begin(&options);
    CHECK_INT(tcpsrv_listen(other, 0, "127.0.0.1"), 0);
    fd = client(tcpsrv_port(server, 0));
    ask(fd, "hal");
    turns(5);
    CHECK(tcpsrv_call_soon(loop, stop_both, other) > 0);
    CHECK(tcpsrv_call_later(loop, 100, finish_late, &fd) > 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    expect(fd, "half\n");
    close(fd);
    tcpsrv_free(other);
    end();
}

static int sleepy(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer, (void)user;
    handled++;
    CHECK_INT(tcpsrv_sleep(300), 0);
    CHECK_INT(tcpsrv_set_timeout(stream, 10, 10), -ENOMEM); /* gone: nothing is kept for it */
    CHECK_INT(tcpsrv_write(stream, "x", 1), TCPSRV_ECLOSED);
    ended++;
    return 0;
}

static void changed_timeouts_body(void) {
    int fd = client(tcpsrv_port(server, 0)), i;
    ask(fd, "0\n");
    expect(fd, "0\n");
    for (i = 0; i < 30; i++) {
        ask(fd, "next\n");
        expect(fd, "next\n");
        turns(1);
        test_sleep_ms(5);
    }
    CHECK_INT(ended, 0);
    close(fd);
    turns(4);
}

static tcpsrv_stream *timed;

static void time_no_more(void *arg) {
    (void)arg;
    CHECK_INT(tcpsrv_set_timeout(timed, 0, 0), 0);
}

static int echo_timed(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    timed = stream;
    CHECK_INT(tcpsrv_set_timeout(stream, 60, 0), 0);
    CHECK(tcpsrv_call_later(loop, 1, time_no_more, NULL) > 0);
    if (tcpsrv_self()) return echo(stream, peer, user);
    return echo_callbacks(stream, peer, user);
}

static void a_deadline_that_was_taken_back_ends_no_later_read(void) {
    tcpsrv_options options = options_for(1);
    options.handle_stream = echo_timed;
    begin(&options);
    changed_timeouts_body();
    end();
    options = options_for(0);
    options.on_stream = echo_timed;
    begin(&options);
    changed_timeouts_body();
    end();
}

enum { KEPT = 3000 };
static int kept_fd;

/* Looks at what it has read after the server has ended its stream, and others use the memory. */
static int keep(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err = tcpsrv_read_until(stream, "\n", 0, &line);
    (void)peer, (void)user;
    handled++;
    if (err || line.size != KEPT) return err;
    while (handled < 3) CHECK_INT(tcpsrv_sleep(1), 0);
    CHECK_INT(tcpsrv_sleep(20), 0);
    CHECK(line.data[0] == 'k' && memcmp(line.data, line.data + 1, KEPT - 2) == 0);
    ended++;
    return 0;
}

static int overwrite(void *arg) {
    static char other[KEPT];
    int fds[2], i;
    (void)arg;
    memset(other, 'o', sizeof other);
    for (i = 0; i < 8; i++) {
        tcpsrv_stream *stream;
        tcpsrv_bytes bytes;
        CHECK_INT(test_pair(fds), 0);
        stream = tcpsrv_stream_from_fd(loop, fds[1]);
        CHECK_INT(send(fds[0], other, sizeof other, MSG_NOSIGNAL), KEPT);
        CHECK_INT(tcpsrv_read_bytes(stream, KEPT, &bytes), 0);
        close(fds[0]);
        CHECK_INT(tcpsrv_sleep(1), 0);
        tcpsrv_close(stream);
    }
    handled = 3;
    return 0;
}

static void a_view_outlives_a_stream_that_the_server_ends(void) {
    static char line[KEPT];
    tcpsrv_options options = options_for(1);
    options.handle_stream = keep;
    options.on_drained = on_drained;
    begin(&options);
    memset(line, 'k', sizeof line);
    line[KEPT - 1] = '\n';
    kept_fd = client(tcpsrv_port(server, 0));
    CHECK_INT(send(kept_fd, line, sizeof line, MSG_NOSIGNAL), KEPT);
    while (!handled) turns(1);
    tcpsrv_drain(server, 1);
    turns(10);
    CHECK_INT(tcpsrv_join(tcpsrv_spawn(loop, overwrite, NULL, 0)), 0);
    while (!ended) turns(1);
    turns(3);
    close(kept_fd);
    end();
}

static void a_drain_that_is_over_does_not_wait_for_a_handler_that_sleeps(void) {
    tcpsrv_options options = options_for(1);
    int fd;
    options.handle_stream = sleepy;
    options.on_drained = on_drained;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    turns(3);
    tcpsrv_drain(server, 20);
    CHECK(at_end(fd) != 0);
    turns(5);
    CHECK_INT(drained, 1);
    CHECK_INT(ended, 0);
    while (!ended) turns(1);
    CHECK_INT(drained, 1);
    close(fd);
    end();
}

static void close_it(tcpsrv_stream *stream, void *arg) {
    (void)arg;
    tcpsrv_close(stream);
}

static void each_live_stream_can_be_reached_and_closed(void) {
    tcpsrv_options options = options_for(0);
    int fds[5], i;
    begin(&options);
    for (i = 0; i < 5; i++) fds[i] = client(tcpsrv_port(server, 0));
    turns(5);
    CHECK_INT(handled, 5);
    tcpsrv_foreach(server, close_it, NULL);
    for (i = 0; i < 5; i++) {
        CHECK_INT(at_end(fds[i]), 1);
        close(fds[i]);
    }
    end();
}

/* A client that sends and never reads is held back, whoever else is served meanwhile; then all of
   it comes back. */
static void flood_body(void) {
    enum { LINE = 1000 };
    int fd = client(tcpsrv_port(server, 0)), other, waits = 0;
    char line[LINE], back[65536];
    size_t sent = 0, got = 0;
    int64_t before = test_live_bytes;
    memset(line, 'f', sizeof line);
    line[LINE - 1] = '\n';
    while (waits < 20) {
        ssize_t n = send(fd, line + sent % LINE, LINE - sent % LINE, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0) sent += (size_t)n;
        waits = n > 0 ? 0 : waits + 1;
        if (n <= 0) turns(1);
        CHECK(test_live_bytes - before < 1 << 20);
    }
    other = client(tcpsrv_port(server, 0));
    ask(other, "other\n");
    expect(other, "other\n");
    close(other);
    shutdown(fd, SHUT_WR);
    while (got < sent / LINE * LINE) {
        ssize_t n = take(fd, back, sizeof back), i;
        if (n <= 0) break;
        for (i = 0; i < n; i++)
            CHECK_INT(back[i], (got + (size_t)i) % LINE == LINE - 1 ? '\n' : 'f');
        got += (size_t)n;
    }
    CHECK_INT(got, sent / LINE * LINE);
    close(fd);
    turns(5);
}

static void a_peer_that_does_not_read_is_held_back_and_loses_nothing(void) {
    both(flood_body);
}

/* So many lines in one send, after which the server has had its turn. */
static void ask_together(int fd, int count, int round) {
    char lines[4000], back[sizeof lines];
    int i, size = 0;
    for (i = 0; i < count; i++) size += snprintf(lines + size, 8, "%d.%d\n", round, i % 1000);
    ask(fd, lines);
    CHECK_INT(take(fd, back, (size_t)size), size);
    CHECK(memcmp(lines, back, (size_t)size) == 0);
}

static void together_body(void) {
    int fd = client(tcpsrv_port(server, 0)), round;
    turns(3);
    for (round = 0; round < 8; round++) {
        ask_together(fd, 1 + round, round);
        ask_together(fd, 60, round);
        ask_together(fd, 300, round);
        ask_together(fd, 100, round);
        ask_together(fd, 480, round);
        ask(fd, "in two ");
        turns(2);
        ask(fd, "pieces\nand one\n");
        expect(fd, "in two pieces\nand one\n");
    }
    close(fd);
    turns(5);
    CHECK_INT(ended, 1);
}

static void lines_that_come_together_are_answered_in_their_order(void) {
    both(together_body);
}

static void sockets_that_wait_for_start_have_ports_and_are_closed_by_stop(void) {
    tcpsrv_options options = options_for(1);
    int fds = test_open_descriptors(100), port;
    loop = tcpsrv_loop_default();
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_bind(server, 0, "127.0.0.1", NULL), 0);
    CHECK_INT(tcpsrv_bind(server, 0, "127.0.0.1", NULL), 0);
    port = tcpsrv_port(server, 0);
    CHECK(port > 0 && tcpsrv_port(server, 1) > 0 && tcpsrv_port(server, 1) != port);
    CHECK_INT(tcpsrv_port(server, 2), -ENOENT);
    tcpsrv_stop(server);
    CHECK_INT(tcpsrv_port(server, 0), -ENOENT);
    CHECK_INT(tcpsrv_bind(server, port, "127.0.0.1", NULL), 0);
    tcpsrv_stop(server);
    CHECK(test_open_descriptors(100) <= fds + 4); /* the loop's own */
    end();
}

static void burst_body(void) {
    char lines[4000], back[sizeof lines];
    int fd = client(tcpsrv_port(server, 0)), i;
    tcpsrv_stats before, after;
    size_t got = 0;
    turns(3);
    memset(lines, '\n', sizeof lines);
    CHECK_INT(send(fd, lines, sizeof lines, MSG_NOSIGNAL), sizeof lines);
    for (i = 0; i < 500 && got < sizeof lines; i++) {
        ssize_t n;
        tcpsrv_get_stats(server, &before);
        turns(1);
        tcpsrv_get_stats(server, &after);
        CHECK(after.bytes_written - before.bytes_written <= 3 * TCPSRV__BURST);
        n = recv(fd, back, sizeof back, MSG_DONTWAIT);
        if (n > 0) got += (size_t)n;
    }
    CHECK_INT(got, sizeof lines);
    close(fd);
    turns(3);
}

/* Each of three ways to write, for each line. */
static void on_line_write_thrice(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    if (err) {
        tcpsrv_close(stream);
        return;
    }
    CHECK_INT(tcpsrv_write(stream, line.data, 1), 0);
    CHECK_INT(tcpsrv_try_write(stream, line.data + 1, 1), 0);
    CHECK_INT(tcpsrv_write(stream, line.data + 2, 1), 0);
    CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line_write_thrice, user), 0);
}

static int write_thrice(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line_write_thrice, user);
}

static void no_way_to_write_overtakes_another(void) {
    tcpsrv_options options = options_for(0);
    int fd, i;
    options.on_stream = write_thrice;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    turns(3);
    for (i = 0; i < 5; i++) {
        ask(fd, "abc\ndef\n");
        expect(fd, "abcdef");
    }
    close(fd);
    turns(3);
    end();
}

static void count_stream(tcpsrv_stream *stream, void *count) {
    (void)stream;
    ++*(int *)count;
}

static void close_each(tcpsrv_stream *stream, void *arg) {
    (void)arg;
    tcpsrv_close(stream);
}

static void foreach_does_not_tell_of_streams_that_close(void) {
    tcpsrv_options options = options_for(0);
    int fd, count = 0;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    turns(3);
    tcpsrv_foreach(server, count_stream, &count);
    CHECK_INT(count, 1);
    tcpsrv_foreach(server, close_each, NULL);
    tcpsrv_foreach(server, count_stream, &count);
    CHECK_INT(count, 1);
    close(fd);
    turns(3);
    end();
}

static void on_megabyte(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *user) {
    if (err) tcpsrv_close(stream);
    else CHECK_INT(tcpsrv_read(stream, tcpsrv_exactly(bytes.size), on_megabyte, user), 0);
}

static int take_megabytes(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_exactly(1000000), on_megabyte, user);
}

static void a_turn_receives_only_so_much_of_a_flood(void) {
    static char flood[100000];
    tcpsrv_options options = options_for(0);
    tcpsrv_stats before, after;
    int fd, i, size = 4 << 20;
    options.on_stream = take_megabytes;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    turns(3);
    for (i = 0; i < 100; i++) {
        while (send(fd, flood, sizeof flood, MSG_DONTWAIT | MSG_NOSIGNAL) > 0) continue;
        tcpsrv_get_stats(server, &before);
        turns(1);
        tcpsrv_get_stats(server, &after);
        CHECK(after.bytes_read - before.bytes_read <= 2 * 262144);
    }
    CHECK(after.bytes_read > sizeof flood);
    close(fd);
    turns(3);
    end();
}

static void a_turn_serves_only_so_much_of_a_pipeline(void) {
    both(burst_body);
}

static void a_busy_pipeline_does_not_starve_others(void) {
    tcpsrv_options options = options_for(1);
    int busy, quiet, i, n = 0;
    char lines[4000], byte;
    begin(&options);
    busy = client(tcpsrv_port(server, 0));
    quiet = client(tcpsrv_port(server, 0));
    turns(3);
    memset(lines, '\n', sizeof lines);
    for (i = 0; i < 50; i++)
        if (send(busy, lines, sizeof lines, MSG_DONTWAIT) < 0) break;
    ask(quiet, "q\n");
    while (recv(quiet, &byte, 1, MSG_DONTWAIT) != 1 && n++ < 100) turns(1);
    CHECK(n <= 3);
    close(busy);
    close(quiet);
    end();
}

/* Every allocation of an exchange fails once; the server serves the next client all the same. */
static void failing(int coroutines) {
    tcpsrv_options options = options_for(coroutines);
    int n, fd;
    char back[8];
    begin(&options);
    for (n = 1; n < 40; n++) {
        fd = client(tcpsrv_port(server, 0));
        ask(fd, "line\n");
        test_fail_alloc_at = n;
        turns(2);
        test_fail_alloc_at = 0;
        close(fd);
        turns(2);
        fd = client(tcpsrv_port(server, 0));
        ask(fd, "fine\n");
        CHECK_INT(take(fd, back, 5), 5);
        close(fd);
        turns(2);
    }
    end();
}

static void a_failed_allocation_costs_one_connection_at_most(void) {
    failing(1);
    failing(0);
}

/* ---- who else reads a handler's stream ------------------------------------------------------- */

enum { LENT = 6 };
static tcpsrv_stream *lent;
static int64_t lender;

static int reads_and_sends_back(void *stream) {
    tcpsrv_bytes line;
    int i, err = 0;
    for (i = 0; i < LENT && !err; i++) {
        err = tcpsrv_read_until((tcpsrv_stream *)stream, "\n", 0, &line);
        if (!err) err = tcpsrv_write((tcpsrv_stream *)stream, line.data, line.size);
    }
    return err;
}

static void sends_back_and_wakes(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    (void)user;
    CHECK_INT(err, 0);
    CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
    tcpsrv_wake(loop, lender);
}

/* Its own lines and those of others, by turns; what it looks at and has written stays in order. */
static int lends(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int64_t other;
    int err;
    (void)peer, (void)user;
    lent = stream;
    lender = tcpsrv_self();
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0) {
        CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
        switch (line.data[0]) {
        case 'c':
            other = tcpsrv_spawn(loop, reads_and_sends_back, stream, 0);
            CHECK_INT(tcpsrv_join(other), 0);
            break;
        case 'f':
            CHECK_INT(tcpsrv_read(stream, tcpsrv_until("\n", 0), sends_back_and_wakes, NULL), 0);
            CHECK_INT(tcpsrv_park(-1), 0);
            break;
        case 'm': CHECK_INT(tcpsrv_park(-1), 0); break;
        default: break;
        }
    }
    handled++;
    return err;
}

static void a_stream_that_its_handler_lends_answers_in_order(void) {
    tcpsrv_options options = options_for(1);
    tcpsrv_bytes line;
    int fd, round, i;
    options.handle_stream = lends;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    for (round = 0; round < 10; round++) {
        ask(fd, "one\nfunction\ntwo\nthree\nc");
        expect(fd, "one\nfunction\ntwo\nthree\n");
        ask(fd, "oroutine\nfour\n");
        expect(fd, "coroutine\nfour\n");
        for (i = 1; i < LENT; i++) {
            ask(fd, "five\n");
            expect(fd, "five\n");
        }
        ask(fd, "main\nsix\n");
        expect(fd, "main\n");
        CHECK_INT(tcpsrv_read_until(lent, "\n", 0, &line), 0); /* from outside */
        CHECK_INT(tcpsrv_write(lent, line.data, line.size), 0);
        expect(fd, "six\n");
        ask(fd, "end\n");
        CHECK_INT(tcpsrv_read_until(lent, "\n", 4, &line), 0);
        CHECK_MEM(line.data, line.size, "end\n");
        tcpsrv_wake(loop, lender);
    }
    close(fd);
    while (!handled) turns(1);
    end();
}

static int looks_and_waits(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err = 0;
    (void)peer, (void)user;
    while (!err) {
        err = tcpsrv_read_until(stream, "\n", 0, &line);
        if (err) break;
        CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
        if (line.data[0] == 'y') err = tcpsrv_yield();
        if (line.data[0] == 's') err = tcpsrv_sleep(60000);
        if (line.data[0] == 'p') err = tcpsrv_park(-1);
        if (err) CHECK_MEM(line.data + 1, line.size - 1, " and wait\n");
    }
    CHECK_INT(err, TCPSRV_ECANCELED);
    ended++;
    return err;
}

/* Wherever it waits after a line of the usual way, the end of the loop is told once. */
static void the_loop_ends_for_handlers_that_wait_anywhere(void) {
    static const char *const lines[] = { "y and wait\n", "s and wait\n", "p and wait\n",
                                         "n and wait\n", "s and wait\nand more\n" };
    tcpsrv_options options = options_for(1);
    int fds[10], i;
    options.handle_stream = looks_and_waits;
    begin(&options);
    for (i = 0; i < 10; i++) {
        fds[i] = client(tcpsrv_port(server, 0));
        ask(fds[i], "begin\n");
        expect(fds[i], "begin\n");
        ask(fds[i], lines[i / 2]);
        expect(fds[i], i / 2 == 4 ? lines[1] : lines[i / 2]);
    }
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    CHECK_INT(ended, 10);
    for (i = 0; i < 10; i++) close(fds[i]);
    tcpsrv_free(server);
}

/* Its first line of a burst is refused as too long; of the others it looks at the last but few
   while it waits for something else. */
static int looks_after_a_refusal(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    char copy[200];
    int i;
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    if (line.data[0] != 'b') return echo(stream, peer, user);
    CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 10, &line), TCPSRV_ETOOBIG);
    for (i = 0; i < 1600; i += (int)line.size)
        CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    memcpy(copy, line.data, line.size);
    copy[line.size] = 0;
    lender = tcpsrv_self();
    tcpsrv_park(-1);
    CHECK_MEM(line.data, line.size, copy);
    handled++;
    return 0;
}

static void looked_at_after_a_refusal(int length) {
    tcpsrv_options options = options_for(1);
    char bytes[2000], line[200] = { 0 };
    int one, other, i;
    options.handle_stream = looks_after_a_refusal;
    begin(&options);
    one = client(tcpsrv_port(server, 0));
    other = client(tcpsrv_port(server, 0));
    memset(bytes, 'b', 1500); /* from here on it receives into larger blocks */
    memcpy(bytes + 1500, "\n", 2);
    ask(one, bytes);
    expect(one, bytes);
    for (i = 0; i < 1850 / length * length; i++)
        bytes[i] = (char)((i + 1) % length ? 'a' + i / length % 26 : '\n');
    bytes[i] = 0;
    lender = 0;
    ask(one, bytes);
    while (!lender) turns(1);
    memset(line, 'x', 150);
    line[150] = '\n';
    ask(other, line); /* whose handler answers from the second line on */
    for (i = 0; i < 20; i++) ask(other, line);
    for (i = 0; i < 20; i++) expect(other, line);
    tcpsrv_wake(loop, lender);
    while (!handled) turns(1);
    close(one);
    close(other);
    turns(3);
    end();
}

static void a_line_that_is_looked_at_after_a_refused_one_stays(void) {
    looked_at_after_a_refusal(50);
    looked_at_after_a_refusal(100);
}

/* It looks at the last line of a burst while it waits for something else. */
static int looks_at_what_is_left(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int i;
    (void)peer, (void)user;
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    CHECK_INT(tcpsrv_write(stream, "\n", 1), 0);
    for (i = 0; i < 2; i++) CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
    CHECK_MEM(line.data, line.size, "little\n");
    lender = tcpsrv_self();
    tcpsrv_park(-1);
    CHECK_MEM(line.data, line.size, "little\n");
    handled++;
    return 0;
}

static void a_short_line_behind_a_long_one_pins_little(void) {
    static char bytes[20001 + sizeof "little\n"];
    tcpsrv_options options = options_for(1);
    tcpsrv_stats stats;
    int fd;
    options.handle_stream = looks_at_what_is_left;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    memset(bytes, 'b', 20000);
    strcpy(bytes + 1500, "\n"); /* from here on it receives into larger blocks */
    ask(fd, bytes);
    expect(fd, "\n");
    bytes[1500] = bytes[1501] = 'b';
    strcpy(bytes + 20000, "\nlittle\n");
    lender = 0;
    ask(fd, bytes);
    while (!lender) turns(1);
    tcpsrv_get_stats(server, &stats);
    CHECK(stats.buffer_memory <= 4 * strlen("little\n") + 512);
    tcpsrv_wake(loop, lender);
    while (!handled) turns(1);
    close(fd);
    turns(3);
    end();
}

/* Through small buffers, so that answers leave in parts. */
static void longer_lines_come_back_whole_however_slowly_they_are_taken(void) {
    enum { LINES = 40, SIZE = 16384 };
    static char line[SIZE + 1], back[SIZE];
    tcpsrv_options options = options_for(1);
    int fd, i, sent = 0, got, size = 4096;
    size_t out = 0;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    for (i = 0; i < LINES; i++) {
        for (got = 0; got < SIZE;) {
            ssize_t n;
            memset(line, 'a' + sent % 26, SIZE - 1);
            line[SIZE - 1] = '\n';
            if (sent < LINES && sent < i + 8 &&
                (n = send(fd, line + out, SIZE - out, MSG_DONTWAIT)) > 0 &&
                (out += (size_t)n) == SIZE) {
                out = 0;
                sent++;
            }
            turns(1);
            n = recv(fd, back + got, (size_t)(SIZE - got), MSG_DONTWAIT);
            if (n > 0) got += (int)n;
        }
        memset(line, 'a' + i % 26, SIZE - 1);
        line[SIZE - 1] = '\n';
        CHECK(memcmp(back, line, SIZE) == 0);
    }
    close(fd);
    turns(3);
    end();
}

static int reads_lines(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    lent = stream;
    return echo(stream, peer, user);
}

static void a_part_of_a_long_line_is_held_in_memory_of_its_size(void) {
    tcpsrv_options options = options_for(1);
    char part[1600];
    int fd, i;
    options.handle_stream = reads_lines;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    memset(part, 'x', sizeof part);
    for (i = 0; i < 4; i++) {
        ask(fd, "one\ntwo\n");
        expect(fd, "one\ntwo\n");
    }
    CHECK_INT(send(fd, part, sizeof part, MSG_NOSIGNAL), (int)sizeof part);
    for (i = 0; i < 500 && (!lent->in || tcpsrv__block_size(lent->in) < sizeof part); i++) turns(1);
    turns(3);
    CHECK_INT(tcpsrv__block_size(lent->in), sizeof part);
    CHECK(!tcpsrv__block_is_loose(lent->in, sizeof part));
    close(fd);
    turns(3);
    end();
}

/* ---- what is sent back from where it was received -------------------------------------------- */

/* A line is sent back from where it is, a second by way of other memory, a third in parts, a fourth
   with its first byte changed, a fifth is not, a sixth twice and from other memory; and so on. */
static int send_back(tcpsrv_stream *stream, tcpsrv_bytes line, int *turn) {
    char copy[2 * 2048], *bytes = (char *)(uintptr_t)line.data;
    switch ((*turn)++ % 6) {
    case 1: return tcpsrv_printf(stream, "%.*s", (int)line.size, line.data);
    case 2:
        if (tcpsrv_write(stream, line.data, 3) != 0) return -1;
        return tcpsrv_write(stream, line.data + 3, line.size - 3);
    case 3: bytes[0] = '!'; break;
    case 4: return 0;
    case 5:
        memcpy(copy, line.data, line.size);
        memcpy(copy + line.size, line.data, line.size);
        return tcpsrv_write(stream, copy, 2 * line.size);
    default: break;
    }
    return tcpsrv_write(stream, line.data, line.size);
}

static int back_turn;

static int sends_back(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if (send_back(stream, line, &back_turn) != 0) return -EIO;
    return err;
}

static void on_line_back(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    if (!err) err = send_back(stream, line, &back_turn);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line_back, user);
    if (err) tcpsrv_close(stream);
}

static int sends_back_by_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line_back, user);
}

/* Lines of a burst, of a length each; what must come back goes to wanted. */
static size_t make_lines(char *sent, char *wanted, size_t *wanted_size, const int *lengths,
                         int *turn) {
    size_t size = 0;
    for (; *lengths; lengths++) {
        size_t length = (size_t)*lengths;
        memset(sent + size, 'a' + *turn % 26, length - 1);
        sent[size + length - 1] = '\n';
        memcpy(wanted + *wanted_size, sent + size, length);
        memcpy(wanted + *wanted_size + length, sent + size, length);
        if (*turn % 6 == 3) wanted[*wanted_size] = '!';
        *wanted_size += *turn % 6 == 4 ? 0 : *turn % 6 == 5 ? 2 * length : length;
        (*turn)++;
        size += length;
    }
    return size;
}

/* Bursts that fit into a coroutine's home, that need more, and whose last line comes in parts. */
static void bursts_come_back(int coroutines) {
    static const int bursts[][14] = {
        { 10, 20, 30, 40, 50, 60, 70 }, { 64, 64, 64, 64, 64, 64, 64, 64 }, { 1500, 1500, 40 },
        { 1200, 60, 1100, 50, 1300, 60, 30, 20 }, { 5, 5, 5, 5, 5, 5, 5, 5 }, { 1900, 10, 10, 10 },
        { 300, 300, 300, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20 },
        { 700, 700, 700, 700, 10, 10, 10, 10 }
    };
    static char sent[8192], wanted[16384], got[16384];
    tcpsrv_options options = options_for(coroutines);
    int round, fd, turn = back_turn = 0;
    if (coroutines) options.handle_stream = sends_back;
    else options.on_stream = sends_back_by_callbacks;
    begin(&options);
    fd = client(tcpsrv_port(server, 0));
    for (round = 0; round < 96; round++) {
        size_t wanted_size = 0, size, last = round < 48 ? 0 : 7;
        size = make_lines(sent, wanted, &wanted_size, bursts[round * 3 % 8], &turn);
        CHECK_INT(send(fd, sent, size - last, MSG_NOSIGNAL), (int)(size - last));
        if (last) turns(2);
        if (last) CHECK_INT(send(fd, sent + size - last, last, MSG_NOSIGNAL), (int)last);
        CHECK_INT(take(fd, got, wanted_size), (int)wanted_size);
        CHECK(memcmp(got, wanted, wanted_size) == 0);
    }
    CHECK_INT(back_turn, turn);
    close(fd);
    end();
}

/* Lines that may have eight bytes; the end of the reads is told. */
static int short_err;

static int short_lines(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    (void)peer, (void)user;
    while ((short_err = tcpsrv_read_until(stream, "\n", 8, &line)) == 0)
        CHECK_INT(tcpsrv_write(stream, line.data, line.size), 0);
    return 0;
}

static void on_short_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *user) {
    short_err = err;
    if (!err) err = tcpsrv_write(stream, line.data, line.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 8), on_short_line, user);
    if (err) tcpsrv_close(stream);
}

static int short_lines_by_callbacks(tcpsrv_stream *stream, const tcpsrv_address *peer,
                                    void *user) {
    (void)peer;
    return tcpsrv_read(stream, tcpsrv_until("\n", 8), on_short_line, user);
}

/* Each burst comes as one event, behind some that were served. */
static void long_lines_end_short_reads(int coroutines) {
    static const char *const bursts[] = { "12345678\n", "1234567\n12345678\n", "123456789" };
    tcpsrv_options options = options_for(coroutines);
    int i, served, fd;
    for (i = 0; i < 3; i++) {
        if (coroutines) options.handle_stream = short_lines;
        else options.on_stream = short_lines_by_callbacks;
        begin(&options);
        fd = client(tcpsrv_port(server, 0));
        for (served = 0; served < 3; served++) {
            ask(fd, "1234567\n");
            expect(fd, "1234567\n");
        }
        ask(fd, bursts[i]);
        if (i == 1) expect(fd, "1234567\n");
        CHECK(at_end(fd));
        CHECK_INT(short_err, TCPSRV_ETOOBIG);
        close(fd);
        end();
    }
}

static void a_line_longer_than_max_ends_a_callbacks_read(void) {
    long_lines_end_short_reads(0);
}

static void a_line_longer_than_max_ends_a_coroutines_read(void) {
    long_lines_end_short_reads(1);
}

static void what_was_received_is_sent_back_from_a_callback(void) {
    bursts_come_back(0);
}

static void what_was_received_is_sent_back_from_a_coroutine(void) {
    bursts_come_back(1);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(a_line_longer_than_max_ends_a_callbacks_read),
        TEST(a_line_longer_than_max_ends_a_coroutines_read),
        TEST(what_was_received_is_sent_back_from_a_callback),
        TEST(what_was_received_is_sent_back_from_a_coroutine),
        TEST(a_stream_that_its_handler_lends_answers_in_order),
        TEST(the_loop_ends_for_handlers_that_wait_anywhere),
        TEST(a_part_of_a_long_line_is_held_in_memory_of_its_size),
        TEST(connections_are_served_side_by_side),
        TEST(a_connection_ends_in_the_turn_that_tells_of_it),
        TEST(after_its_own_end_a_server_receives_when_the_peer_has_answered),
        TEST(nothing_hangs_on_what_lies_behind_a_part_of_a_line),
        TEST(options_report_every_default),
        TEST(stopping_twice_and_listening_again_work),
        TEST(a_handler_may_stop_the_server_in_the_middle_of_a_batch),
        TEST(a_handler_may_free_the_server),
        TEST(freeing_with_parked_handlers_ends_them),
        TEST(freeing_the_loop_ends_handlers_and_the_server_goes_after_it),
        TEST(at_max_connections_others_wait_in_the_backlog_and_are_served_later),
        TEST(without_descriptors_accepting_pauses_and_resumes),
        TEST(results_of_handlers_are_logged_with_the_peer),
        TEST(an_idle_connection_ends_and_a_busy_one_does_not),
        TEST(draining_ends_idle_reads_and_lets_half_messages_finish),
        TEST(a_server_that_listens_again_has_no_drain_to_come),
        TEST(a_drain_answers_the_first_message_that_is_on_its_way),
        TEST(a_drain_answers_what_is_in_the_kernel_already),
        TEST(the_last_server_to_drain_stops_the_loop),
        TEST(a_drain_that_is_over_does_not_wait_for_a_handler_that_sleeps),
        TEST(a_deadline_that_was_taken_back_ends_no_later_read),
        TEST(a_view_outlives_a_stream_that_the_server_ends),
        TEST(each_live_stream_can_be_reached_and_closed),
        TEST(a_peer_that_does_not_read_is_held_back_and_loses_nothing),
        TEST(lines_that_come_together_are_answered_in_their_order),
        TEST(sockets_that_wait_for_start_have_ports_and_are_closed_by_stop),
        TEST(no_way_to_write_overtakes_another),
        TEST(foreach_does_not_tell_of_streams_that_close),
        TEST(a_turn_receives_only_so_much_of_a_flood),
        TEST(a_line_that_is_looked_at_after_a_refused_one_stays),
        TEST(a_short_line_behind_a_long_one_pins_little),
        TEST(longer_lines_come_back_whole_however_slowly_they_are_taken),
        TEST(a_turn_serves_only_so_much_of_a_pipeline),
        TEST(a_busy_pipeline_does_not_starve_others),
        TEST(a_failed_allocation_costs_one_connection_at_most),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
