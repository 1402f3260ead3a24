/* What operators need: limits and their counters, sockets and words of a service manager, an end by
   signal. */
#include "test.h"

static tcpsrv *server;
static tcpsrv_loop *loop;
static int begun, drained;
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
    (void)peer, (void)user;
    begun++;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

static void on_drained(tcpsrv *which, void *user) {
    (void)user;
    CHECK(which == server);
    drained++;
}

static tcpsrv_options plain(void) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = echo;
    options.log = log_line;
    options.on_drained = on_drained;
    return options;
}

static void begin(const tcpsrv_options *options) {
    begun = drained = log_lines = 0;
    log_text[0] = 0;
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

static tcpsrv_stats stats(void) {
    tcpsrv_stats now;
    tcpsrv_get_stats(server, &now);
    return now;
}

/* A client at 127.0.0.host. */
static int client(int host) {
    return test_client(host, tcpsrv_port(server, 0));
}

static void put(int fd, const char *text) {
    CHECK_INT(send(fd, text, strlen(text), MSG_NOSIGNAL), (int)strlen(text));
}

/* What comes until there is a line's end, or the connection's; "" for that alone. */
static const char *line_from(int fd) {
    static char text[512];
    size_t got = 0;
    int i;
    for (i = 0; i < 2000 && got < sizeof text - 1; i++) {
        ssize_t n = recv(fd, text + got, sizeof text - 1 - got, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
        if (n > 0) got += (size_t)n;
        if (got && text[got - 1] == '\n') break;
        if (n < 0) turns(1);
    }
    CHECK(i < 2000);
    text[got] = 0;
    return text;
}

static void served(int fd) {
    put(fd, "hi\n");
    CHECK_STR(line_from(fd), "hi\n");
}

/* ---- limits ---------------------------------------------------------------------------------- */

static void over_the_limit_of_an_address_connections_are_closed_and_counted(void) {
    tcpsrv_options options = plain();
    int fds[3], other, i;
    options.max_connections_per_ip = 2;
    begin(&options);
    for (i = 0; i < 2; i++) served(fds[i] = client(1));
    for (i = 0; i < 5; i++) {
        fds[2] = client(1);
        CHECK_STR(line_from(fds[2]), "");
        close(fds[2]);
    }
    CHECK_INT(stats().refused_per_ip, 5);
    CHECK_INT(stats().accepted, 2);
    CHECK_INT(log_lines, 1);
    CHECK(strstr(log_text, "1 connection refused from 127.0.0.1:") == log_text);
    CHECK(strstr(log_text, "max_connections_per_ip is reached") != NULL);
    served(other = client(2));
    served(fds[0]);
    close(fds[0]);
    turns(5);
    served(fds[0] = client(1));
    CHECK_INT(begun, 4);
    close(fds[0]);
    close(fds[1]);
    close(other);
    turns(5);
    CHECK_INT(stats().active, 0);
    CHECK(server->crowds.slots == NULL);
    end();
}

static void behind_a_proxy_the_address_of_the_header_counts(void) {
    tcpsrv_options options = plain();
    int fds[5], i;
    options.max_connections_per_ip = 2;
    options.proxy_protocol = TCPSRV_PROXY_REQUIRED;
    options.trusted = "127.0.0.0/8";
    begin(&options);
    for (i = 0; i < 5; i++) {
        fds[i] = client(1);
        put(fds[i], i < 3 ? "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
                          : "PROXY TCP4 192.0.2.9 192.0.2.2 1 2\r\n");
        put(fds[i], "hi\n");
        CHECK_STR(line_from(fds[i]), i == 2 ? "" : "hi\n");
    }
    CHECK_INT(stats().refused_per_ip, 1);
    CHECK_INT(stats().refused_proxy, 0);
    CHECK(strstr(log_text, "connection refused from 192.0.2.1:1: ") != NULL);
    for (i = 0; i < 5; i++) close(fds[i]);
    turns(5);
    CHECK_INT(server->crowds.used, 0);
    end();
}

static tcpsrv_address peer_of(const char *text) {
    tcpsrv_address name;
    memset(&name, 0, sizeof name);
    name.family = strchr(text, ':') ? AF_INET6 : AF_INET;
    CHECK_INT(inet_pton(name.family, text, name.ip), 1);
    return name;
}

static uint64_t key_of(const char *text) {
    tcpsrv_address name = peer_of(text);
    uint64_t key;
    CHECK_INT(tcpsrv__crowd_key(&name, &key), 1);
    return key;
}

static void addresses_of_one_client_have_one_key(void) {
    tcpsrv_address unnamed;
    uint64_t key;
    CHECK(key_of("192.0.2.1") != key_of("192.0.2.2"));
    CHECK(key_of("192.0.2.1") == key_of("::ffff:192.0.2.1"));
    CHECK(key_of("2001:db8::1") == key_of("2001:db8::ffff:ffff:ffff:ffff"));
    CHECK(key_of("2001:db8::1") != key_of("2001:db8:0:1::1"));
    CHECK(key_of("::1") != key_of("0.0.0.1"));
    memset(&unnamed, 0, sizeof unnamed);
    CHECK_INT(tcpsrv__crowd_key(&unnamed, &key), 0);
    unnamed.family = AF_UNIX;
    CHECK_INT(tcpsrv__crowd_key(&unnamed, &key), 0);
}

static tcpsrv_address numbered(uint32_t n) {
    tcpsrv_address name;
    memset(&name, 0, sizeof name);
    name.family = AF_INET;
    n = htonl(n);
    memcpy(name.ip, &n, sizeof n);
    return name;
}

/* Against plain counters, and never more than eight times the slots that are needed. */
static void the_table_of_addresses_counts_right_and_shrinks(void) {
    enum { PEERS = 3000, MOST = 3 };
    static unsigned char counts[PEERS];
    tcpsrv__crowds crowds;
    uint32_t random = 1, i, live = 0, grow;
    memset(&crowds, 0, sizeof crowds);
    for (i = 0; i < 400000; i++) {
        uint32_t n;
        tcpsrv_address peer;
        random = random * 1664525u + 1013904223u;
        n = (random >> 8) % PEERS;
        grow = (i / 50000) % 2 == 0 ? 6 : 2; /* it fills, and it empties */
        peer = numbered(n * 2654435761u);
        if ((random >> 5) % 8 < grow) {
            int err = tcpsrv__crowd_join(&crowds, &peer, MOST);
            CHECK_INT(err, counts[n] == MOST ? TCPSRV__EPER_IP : 0);
            if (!err && !counts[n]++) live++;
        } else if (counts[n]) {
            tcpsrv__crowd_leave(&crowds, &peer);
            if (!--counts[n]) live--;
        }
        CHECK_INT(crowds.used, live);
        CHECK(crowds.capacity <= 16 || crowds.capacity <= live * 8);
    }
    for (i = 0; i < PEERS; i++) {
        tcpsrv_address peer = numbered(i * 2654435761u);
        while (counts[i]--) tcpsrv__crowd_leave(&crowds, &peer);
    }
    CHECK(crowds.slots == NULL);
}

static void without_the_limit_addresses_are_not_kept(void) {
    tcpsrv_options options = plain();
    int fd;
    begin(&options);
    served(fd = client(1));
    CHECK(server->crowds.slots == NULL);
    close(fd);
    end();
}

static void without_memory_for_its_address_a_connection_is_dropped(void) {
    tcpsrv_options options = plain();
    int fd;
    options.max_connections_per_ip = 1;
    begin(&options);
    test_fail_alloc_at = 1;
    fd = client(1);
    CHECK_STR(line_from(fd), "");
    CHECK_INT(stats().shed, 1);
    CHECK_INT(stats().accepted, 0);
    close(fd);
    served(fd = client(1));
    close(fd);
    end();
}

static void at_max_connections_one_line_says_so(void) {
    tcpsrv_options options = plain();
    int fds[4], i;
    options.max_connections = 2;
    begin(&options);
    for (i = 0; i < 4; i++) fds[i] = client(1);
    turns(10);
    CHECK_INT(begun, 2);
    CHECK_INT(log_lines, 1);
    CHECK_STR(log_text, "1 accept paused: max_connections is reached");
    CHECK_INT(stats().connection_limits, 1);
    for (i = 0; i < 4; i++) {
        served(fds[i]);
        close(fds[i]);
    }
    CHECK(stats().connection_limits >= 1 && stats().connection_limits <= stats().accept_pauses);
    end();
}

/* ---- counters -------------------------------------------------------------------------------- */

static void abort_it(tcpsrv_stream *stream, void *arg) {
    (void)arg;
    tcpsrv_abort(stream);
}

static void resets(int fd) {
    struct linger now = { 1, 0 };
    CHECK_INT(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now), 0);
    close(fd);
    turns(5);
}

static void every_end_is_counted_by_its_reason(void) {
    tcpsrv_options options = plain();
    int fd;
    options.idle_timeout_ms = 200;
    begin(&options);
    served(fd = client(1));
    close(fd);
    turns(5);
    CHECK_INT(stats().closed_in_order, 1);
    served(fd = client(1));
    resets(fd);
    CHECK_INT(stats().closed_by_reset, 1);
    served(fd = client(1));
    tcpsrv_foreach(server, abort_it, NULL);
    turns(5);
    CHECK_INT(stats().closed_by_abort, 1);
    close(fd);
    served(fd = client(1));
    CHECK_STR(line_from(fd), "");
    turns(5);
    CHECK_INT(stats().closed_by_timeout, 1);
    CHECK_INT(stats().timeouts_idle, 1);
    close(fd);
    CHECK_INT(stats().closed_by_error, 0);
    CHECK_INT(stats().accepted, 4);
    CHECK_INT(stats().bytes_read, 12);
    CHECK_INT(stats().bytes_written, 12);
    end();
}

static void doze(void *arg) {
    (void)arg;
    test_sleep_ms(60);
}

static void the_longest_turn_is_told(void) {
    tcpsrv_options options = plain();
    begin(&options);
    tcpsrv_call_soon(loop, doze, NULL);
    turns(3);
    CHECK_INT(stats().longest_turn_ns, 0); /* nobody had asked */
    tcpsrv_call_soon(loop, doze, NULL);
    turns(3);
    CHECK(stats().longest_turn_ns >= 59000000u);
    CHECK(stats().longest_turn_ns < 30000000000u);
    end();
}

/* ---- sockets that were passed ---------------------------------------------------------------- */

static void pass(const char *pid, const char *count, const char *names) {
    char text[32];
    snprintf(text, sizeof text, "%ld", (long)getpid());
    CHECK_INT(setenv("LISTEN_PID", pid ? pid : text, 1), 0);
    CHECK_INT(setenv("LISTEN_FDS", count, 1), 0);
    if (names) CHECK_INT(setenv("LISTEN_FDNAMES", names, 1), 0);
}

static void check_cleared(void) {
    CHECK(!getenv("LISTEN_PID") && !getenv("LISTEN_FDS") && !getenv("LISTEN_FDNAMES"));
}

/* Listening sockets as 3 and 4, whatever was there before. */
static void place_sockets(void) {
    struct sockaddr_in address;
    int fd = test_listener(&address), other = test_listener(&address);
    int high = fcntl(fd, F_DUPFD, 10), other_high = fcntl(other, F_DUPFD, 10);
    close(fd);
    close(other);
    CHECK_INT(dup2(high, 3), 3);
    CHECK_INT(dup2(other_high, 4), 4);
    close(high);
    close(other_high);
}

static void passed_sockets_are_served_and_the_variables_cleared(void) {
    tcpsrv_options options = plain();
    int fds[8], fd, i;
    pid_t pid = fork();
    if (pid == 0) {
        place_sockets();
        pass(NULL, "2", "web:admin");
        CHECK_INT(tcpsrv_systemd_sockets(fds, 1), -ENOSPC);
        CHECK(getenv("LISTEN_FDS") != NULL);
        CHECK_INT(tcpsrv_systemd_sockets(fds, 8), 2);
        check_cleared();
        CHECK_STR(tcpsrv_systemd_name(0), "web");
        CHECK_STR(tcpsrv_systemd_name(1), "admin");
        CHECK_STR(tcpsrv_systemd_name(2), "");
        CHECK_STR(tcpsrv_systemd_name(-1), "");
        for (i = 0; i < 2; i++) {
            CHECK_INT(fds[i], 3 + i);
            CHECK_INT(fcntl(fds[i], F_GETFD), FD_CLOEXEC);
        }
        loop = tcpsrv_loop_default();
        server = tcpsrv_new(&options);
        CHECK_INT(tcpsrv_add_sockets(server, fds, 2), 0);
        served(fd = client(1));
        close(fd);
        CHECK_INT(tcpsrv_systemd_sockets(fds, 8), 0);
        end();
        _exit(0);
    }
    CHECK_INT(waitpid(pid, &i, 0), pid);
    CHECK_INT(i, 0);
}

static void without_passed_sockets_there_are_none(void) {
    int fds[8];
    CHECK_INT(tcpsrv_systemd_sockets(fds, 8), 0);
    CHECK_STR(tcpsrv_systemd_name(0), "");
    pass("1", "2", NULL); /* meant for another process */
    CHECK_INT(tcpsrv_systemd_sockets(fds, 8), 0);
    check_cleared();
    pass(NULL, "0", NULL);
    CHECK_INT(tcpsrv_systemd_sockets(fds, 8), 0);
    check_cleared();
}

static void malformed_variables_are_refused(void) {
    static const char *const counts[] = { "x", "", "-1", "2x", " 2", "02", "99999999999999999999" };
    int fds[8];
    size_t i;
    for (i = 0; i < sizeof counts / sizeof *counts; i++) {
        pass(NULL, counts[i], "a:b");
        CHECK_INT(tcpsrv_systemd_sockets(fds, 8), -EINVAL);
        CHECK_STR(tcpsrv_last_error(), "systemd_sockets LISTEN_FDS: Invalid argument");
        check_cleared();
    }
    pass("x", "1", NULL);
    CHECK_INT(tcpsrv_systemd_sockets(fds, 8), -EINVAL);
    if (fcntl(4, F_GETFD) >= 0) SKIP("descriptor 4 is in use here");
    pass(NULL, "2", NULL);
    CHECK_INT(tcpsrv_systemd_sockets(fds, 8), -EBADF);
    check_cleared();
}

static void too_many_names_are_cut(void) {
    char names[3000];
    memset(names, 'n', sizeof names);
    names[sizeof names - 1] = 0;
    names[500] = ':';
    tcpsrv__keep_names(names);
    CHECK_INT(strlen(tcpsrv_systemd_name(0)), 500);
    CHECK_INT(strlen(tcpsrv_systemd_name(1)), 1024 - 501 - 1);
    CHECK_STR(tcpsrv_systemd_name(2), "");
}

/* ---- telling the manager --------------------------------------------------------------------- */

static int manager(const char *path) {
    struct sockaddr_un name;
    socklen_t size;
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    snprintf(name.sun_path, sizeof name.sun_path, "%s", path);
    size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (path[0] == '@') name.sun_path[0] = 0;
    CHECK_INT(bind(fd, (struct sockaddr *)&name, size), 0);
    CHECK_INT(setenv("NOTIFY_SOCKET", path, 1), 0);
    return fd;
}

static const char *told(int fd) {
    static char text[200];
    ssize_t n = recv(fd, text, sizeof text - 1, MSG_DONTWAIT);
    text[n > 0 ? n : 0] = 0;
    return text;
}

static void the_manager_is_told_by_path_and_by_abstract_name(void) {
    char directory[] = "/tmp/tcpserver-test-XXXXXX", path[128];
    int fd;
    CHECK_INT(tcpsrv_notify("READY=1"), 0); /* nobody asked */
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/notify", directory);
    fd = manager(path);
    CHECK_INT(tcpsrv_notify("READY=1\nSTATUS=here"), 0);
    CHECK_STR(told(fd), "READY=1\nSTATUS=here");
    close(fd);
    unlink(path);
    CHECK_INT(tcpsrv_notify("READY=1"), -ENOENT);
    CHECK(strstr(tcpsrv_last_error(), path) != NULL);
    rmdir(directory);
    snprintf(path, sizeof path, "@tcpserver-notify-%ld", (long)getpid());
    fd = manager(path);
    CHECK_INT(tcpsrv_notify("STOPPING=1"), 0);
    CHECK_STR(told(fd), "STOPPING=1");
    close(fd);
}

static void a_manager_that_cannot_be_told_is_an_error(void) {
    char path[200];
    int fd, i, err = 0;
    setenv("NOTIFY_SOCKET", "vsock:2:1234", 1);
    CHECK_INT(tcpsrv_notify("READY=1"), -ENOTSUP);
    setenv("NOTIFY_SOCKET", "relative", 1);
    CHECK_INT(tcpsrv_notify("READY=1"), -ENOTSUP);
    memset(path, 'x', sizeof path - 1);
    path[0] = '/';
    path[sizeof path - 1] = 0;
    setenv("NOTIFY_SOCKET", path, 1);
    CHECK_INT(tcpsrv_notify("READY=1"), -ENAMETOOLONG);
    snprintf(path, sizeof path, "@tcpserver-notify-%ld", (long)getpid());
    fd = manager(path);
    for (i = 0; i < 10000 && !err; i++) err = tcpsrv_notify("WATCHDOG=1");
    CHECK_INT(err, -EAGAIN); /* it never reads, and we do not wait for ever */
    close(fd);
    setenv("NOTIFY_SOCKET", "", 1);
    CHECK_INT(tcpsrv_notify("READY=1"), 0);
}

/* ---- socket files ---------------------------------------------------------------------------- */

static void a_parent_of_workers_removes_its_socket_files_and_says_that_it_stops(void) {
    char directory[] = "/tmp/tcpserver-test-XXXXXX", path[128], name[64];
    struct stat status;
    int result, watcher;
    pid_t pid;
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/socket", directory);
    snprintf(name, sizeof name, "@tcpserver-notify-%ld", (long)getpid());
    watcher = manager(name);
    pid = fork();
    if (pid == 0) {
        tcpsrv_options options = plain();
        int fd = tcpsrv_bind_unix_socket(path, 0, 0);
        if (tcpsrv_fork_processes(2, 0) < 0) _exit(9);
        server = tcpsrv_new(&options);
        if (tcpsrv_drain_on_signal(server, SIGTERM, 1000) != 0) _exit(8);
        if (tcpsrv_add_socket(server, fd) != 0) _exit(7);
        if (tcpsrv_notify("READY=1") != 0) _exit(6);
        loop = tcpsrv_loop_default();
        while (!drained) turns(1);
        end();
        _exit(0);
    }
    while (strcmp(told(watcher), "READY=1") != 0) test_sleep_ms(5);
    while (strcmp(told(watcher), "READY=1") != 0) test_sleep_ms(5);
    CHECK_INT(lstat(path, &status), 0);
    CHECK_INT(kill(pid, SIGTERM), 0);
    CHECK_INT(waitpid(pid, &result, 0), pid);
    CHECK_INT(result, 0);
    CHECK_STR(told(watcher), "STOPPING=1");
    CHECK_STR(told(watcher), ""); /* the workers do not say so */
    CHECK_INT(lstat(path, &status), -1);
    CHECK_INT(rmdir(directory), 0);
    close(watcher);
}

/* ---- an end by signal ------------------------------------------------------------------------ */

static void a_signal_drains_and_idle_clients_end_at_their_message_boundary(void) {
    tcpsrv_options options = plain();
    char name[64];
    int idle, half, watcher;
    snprintf(name, sizeof name, "@tcpserver-notify-%ld", (long)getpid());
    watcher = manager(name);
    begin(&options);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 20000), 0);
    served(idle = client(1));
    served(half = client(1));
    put(half, "half a ");
    turns(3);
    CHECK_INT(raise(SIGTERM), 0);
    CHECK_STR(line_from(idle), "");
    CHECK_INT(tcpsrv_draining(server), 1);
    CHECK_STR(told(watcher), "STOPPING=1");
    put(half, "message\n");
    CHECK_STR(line_from(half), "half a message\n");
    CHECK_STR(line_from(half), "");
    close(idle);
    close(half);
    while (!drained) turns(1);
    CHECK_INT(stats().closed_in_order, 2);
    close(watcher);
    end();
}

static void a_second_signal_aborts(void) {
    tcpsrv_options options = plain();
    int half;
    begin(&options);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, -1), 0);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGINT, -1), 0);
    served(half = client(1));
    put(half, "half a ");
    turns(3);
    CHECK_INT(raise(SIGTERM), 0);
    turns(10);
    CHECK_INT(drained, 0);
    CHECK_INT(raise(SIGINT), 0);
    while (!drained) turns(1);
    CHECK_INT(stats().closed_by_abort, 1);
    CHECK_INT(raise(SIGINT), 0); /* once more does nothing */
    turns(3);
    CHECK_INT(drained, 1);
    close(half);
    end();
    CHECK_INT(tcpsrv__signal_fd[SIGTERM], 0);
}

/* Without an on_drained the loop stops: the whole program's end is one line. */
static void asked_before_the_start_it_holds_from_then_on(void) {
    tcpsrv_options options = plain();
    options.on_drained = NULL;
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 1000), 0);
    CHECK_INT(tcpsrv__signal_fd[SIGTERM], 0);
    CHECK_INT(tcpsrv_listen(server, 0, "127.0.0.1"), 0);
    loop = tcpsrv_loop_default();
    CHECK_INT(raise(SIGTERM), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    end();
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 1000), 0);
    tcpsrv_free(server);
}

static void signals_that_cannot_be_had_are_refused(void) {
    tcpsrv_options options = plain();
    begin(&options);
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGKILL, 1000), -EINVAL);
    CHECK_INT(tcpsrv_drain_on_signal(server, 0, 1000), -EINVAL);
    test_fail_alloc_at = 1;
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 1000), -ENOMEM);
    test_fail_alloc_at = 2;
    CHECK_INT(tcpsrv_drain_on_signal(server, SIGTERM, 1000), -ENOMEM);
    test_fail_alloc_at = 0;
    CHECK_INT(tcpsrv__signal_fd[SIGTERM], 0);
    end();
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(over_the_limit_of_an_address_connections_are_closed_and_counted),
        TEST(behind_a_proxy_the_address_of_the_header_counts),
        TEST(addresses_of_one_client_have_one_key),
        TEST(the_table_of_addresses_counts_right_and_shrinks),
        TEST(without_the_limit_addresses_are_not_kept),
        TEST(without_memory_for_its_address_a_connection_is_dropped),
        TEST(at_max_connections_one_line_says_so),
        TEST(every_end_is_counted_by_its_reason),
        TEST(the_longest_turn_is_told),
        TEST(passed_sockets_are_served_and_the_variables_cleared),
        TEST(without_passed_sockets_there_are_none),
        TEST(malformed_variables_are_refused),
        TEST(too_many_names_are_cut),
        TEST(the_manager_is_told_by_path_and_by_abstract_name),
        TEST(a_manager_that_cannot_be_told_is_an_error),
        TEST(a_parent_of_workers_removes_its_socket_files_and_says_that_it_stops),
        TEST(a_signal_drains_and_idle_clients_end_at_their_message_boundary),
        TEST(a_second_signal_aborts),
        TEST(asked_before_the_start_it_holds_from_then_on),
        TEST(signals_that_cannot_be_had_are_refused),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
