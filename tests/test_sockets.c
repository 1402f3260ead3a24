/* Addresses and listening sockets: what binds, what is refused with which words, what is left. */
#if defined(__linux__)
#define SO_NOSIGPIPE 9999 /* an option that no socket takes, as on macOS once the peer has gone */
#endif
#include "test.h"

enum { MAX = 16 };
static int fds[MAX];

static void close_fds(int count) {
    while (count > 0) close(fds[--count]);
}

static int local_port(int fd) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    CHECK_INT(getsockname(fd, (struct sockaddr *)&name, &size), 0);
    return ntohs(name.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&name)->sin6_port
                                            : ((struct sockaddr_in *)(void *)&name)->sin_port);
}

static int option(int fd, int level, int name) {
    int value = -1;
    socklen_t size = sizeof value;
    CHECK_INT(getsockopt(fd, level, name, &value, &size), 0);
    return value;
}

static int family(int fd) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    CHECK_INT(getsockname(fd, (struct sockaddr *)&name, &size), 0);
    return name.ss_family;
}

static void port_0_gives_all_families_the_same_free_port(void) {
    int i, n = tcpsrv_bind_sockets(0, NULL, NULL, fds, MAX);
    CHECK(n >= 1);
    for (i = 0; i < n; i++) {
        CHECK_INT(local_port(fds[i]), local_port(fds[0]));
        CHECK_INT(option(fds[i], SOL_SOCKET, SO_ACCEPTCONN), 1);
        CHECK(fcntl(fds[i], F_GETFL) & O_NONBLOCK);
        CHECK(fcntl(fds[i], F_GETFD) & FD_CLOEXEC);
        if (family(fds[i]) == AF_INET6) CHECK_INT(option(fds[i], IPPROTO_IPV6, IPV6_V6ONLY), 1);
        if (i > 0) CHECK(family(fds[i]) != family(fds[0]));
    }
    CHECK_INT(family(fds[0]), AF_INET);
    close_fds(n);
}

static void a_family_can_be_asked_for(void) {
    tcpsrv_bind_options options = { AF_INET, 5, 0 };
    CHECK_INT(tcpsrv_bind_sockets(0, "", &options, fds, MAX), 1);
    CHECK_INT(family(fds[0]), AF_INET);
    close_fds(1);
    CHECK_INT(tcpsrv_bind_sockets(0, "localhost", &options, fds, MAX), 1);
    close_fds(1);
}

static void ports_out_of_range_are_refused_by_name(void) {
    CHECK_INT(tcpsrv_bind_sockets(70000, "127.0.0.1", NULL, fds, MAX), -EINVAL);
    CHECK_STR(tcpsrv_last_error(), "bind 127.0.0.1:70000: Invalid argument");
    CHECK_INT(tcpsrv_bind_sockets(-1, NULL, NULL, fds, MAX), -EINVAL);
    CHECK_STR(tcpsrv_last_error(), "bind *:-1: Invalid argument");
}

static void a_used_port_says_which(void) {
    char expected[80];
    int other[MAX], port;
    CHECK_INT(tcpsrv_bind_sockets(0, "127.0.0.1", NULL, fds, MAX), 1);
    port = local_port(fds[0]);
    CHECK_INT(tcpsrv_bind_sockets(port, "127.0.0.1", NULL, other, MAX), -EADDRINUSE);
    snprintf(expected, sizeof expected, "bind 127.0.0.1:%d: Address already in use", port);
    CHECK_STR(tcpsrv_last_error(), expected);
    close_fds(1);
}

static void what_is_not_here_cannot_be_bound(void) {
    CHECK_INT(tcpsrv_bind_sockets(0, "192.0.2.1", NULL, fds, MAX), -EADDRNOTAVAIL);
    CHECK(strstr(tcpsrv_last_error(), "bind 192.0.2.1:0: ") == tcpsrv_last_error());
    CHECK(tcpsrv_bind_sockets(0, "no-such-host.invalid", NULL, fds, MAX) <= TCPSRV_ERESOLVE);
    CHECK(strstr(tcpsrv_last_error(), "resolve no-such-host.invalid:0: ") == tcpsrv_last_error());
}

static void too_little_room_for_all_sockets_leaves_none_open(void) {
    int n = tcpsrv_bind_sockets(0, NULL, NULL, fds, MAX);
    close_fds(n);
    if (n < 2) SKIP("a host with one address family");
    CHECK_INT(tcpsrv_bind_sockets(0, NULL, NULL, fds, 1), -ENOSPC);
}

static void with_reuse_port_two_bind_the_same(void) {
    tcpsrv_bind_options options = { AF_INET, 0, 1 };
    int other[MAX];
    CHECK_INT(tcpsrv_bind_sockets(0, "127.0.0.1", &options, fds, MAX), 1);
    CHECK_INT(tcpsrv_bind_sockets(local_port(fds[0]), "127.0.0.1", &options, other, MAX), 1);
    close(other[0]);
    close_fds(1);
}

static void without_descriptors_the_step_is_named_and_nothing_leaks(void) {
    struct rlimit limit, low;
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &limit), 0);
    low = limit;
    low.rlim_cur = 3;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &low), 0);
    CHECK_INT(tcpsrv_bind_sockets(0, "127.0.0.1", NULL, fds, MAX), -EMFILE);
    CHECK(strstr(tcpsrv_last_error(), "socket ") == tcpsrv_last_error());
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

/* ---- text ------------------------------------------------------------------------------------ */

static void addresses_read_as_people_write_them(void) {
    tcpsrv_address address;
    char text[TCPSRV_ADDRESS_TEXT];
    memset(&address, 0, sizeof address);
    address.family = AF_INET;
    address.port = 80;
    memcpy(address.ip, "\xc0\x00\x02\x01", 4);
    CHECK_STR(tcpsrv_address_text(&address, text, sizeof text), "192.0.2.1:80");
    address.family = AF_INET6;
    memset(address.ip, 0, sizeof address.ip);
    address.ip[15] = 1;
    CHECK_STR(tcpsrv_address_text(&address, text, sizeof text), "[::1]:80");
    address.scope_id = 7;
    CHECK_STR(tcpsrv_address_text(&address, text, sizeof text), "[::1%7]:80");
    address.family = AF_UNIX;
    strcpy(address.path, "/run/app.sock");
    CHECK_STR(tcpsrv_address_text(&address, text, sizeof text), "unix:/run/app.sock");
    CHECK_STR(tcpsrv_address_text(&address, text, 8), "unix:/r");
}

static void every_code_has_a_name(void) {
    CHECK_STR(tcpsrv_strerror(-ENOENT), "No such file or directory");
    CHECK_STR(tcpsrv_strerror(TCPSRV_EOF), "the peer has finished");
    CHECK(strlen(tcpsrv_strerror(TCPSRV_ERESOLVE - 2)) > 0);
    CHECK_STR(tcpsrv_strerror(-10999), "unknown code");
    CHECK_STR(tcpsrv_strerror(0), "success");
}

/* ---- Unix sockets ---------------------------------------------------------------------------- */

static char directory[] = "/tmp/tcpserver-test-XXXXXX", path[128];

static void make_directory(void) {
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/sock", directory);
}

static void remove_directory(void) {
    unlink(path);
    CHECK_INT(rmdir(directory), 0);
}

static int say_hi(tcpsrv_stream *stream, const tcpsrv_address *peer) {
    CHECK_INT(peer->family, AF_UNIX);
    return tcpsrv_write(stream, "hi", 2);
}

static int greet(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    int err = say_hi(stream, peer);
    (void)user;
    tcpsrv_close(stream);
    return err;
}

/* A server owns the socket, so that closing it is the library's. */
static tcpsrv *serve(int fd) {
    tcpsrv_options options;
    tcpsrv *server;
    memset(&options, 0, sizeof options);
    options.on_stream = greet;
    server = tcpsrv_new(&options);
    CHECK_INT(tcpsrv_add_socket(server, fd), 0);
    return server;
}

static void finish(tcpsrv *server) {
    tcpsrv_free(server);
    CHECK_INT(tcpsrv_loop_free(tcpsrv_loop_default()), 0);
}

static void a_unix_socket_has_its_mode_and_goes_with_its_server(void) {
    struct stat status;
    tcpsrv *server;
    make_directory();
    umask(0);
    server = serve(tcpsrv_bind_unix_socket(path, 0640, 0));
    CHECK_INT(lstat(path, &status), 0);
    CHECK_INT(status.st_mode & 07777, 0640);
    CHECK_INT(tcpsrv_port(server, 0), 0);
    finish(server);
    CHECK_INT(lstat(path, &status), -1);
    remove_directory();
}

static void a_live_socket_is_not_replaced_and_a_dead_one_is(void) {
    struct stat status;
    tcpsrv *server;
    int dead;
    make_directory();
    server = serve(tcpsrv_bind_unix_socket(path, 0, 0));
    CHECK_INT(tcpsrv_bind_unix_socket(path, 0, 0), -EADDRINUSE);
    CHECK(strstr(tcpsrv_last_error(), path) != NULL);
    finish(server);
    dead = socket(AF_UNIX, SOCK_STREAM, 0);
    {
        struct sockaddr_un name;
        memset(&name, 0, sizeof name);
        name.sun_family = AF_UNIX;
        strcpy(name.sun_path, path);
        CHECK_INT(bind(dead, (struct sockaddr *)&name, sizeof name), 0);
    }
    close(dead);
    CHECK_INT(lstat(path, &status), 0);
    server = serve(tcpsrv_bind_unix_socket(path, 0, 0));
    CHECK_INT(lstat(path, &status), 0);
    CHECK_INT(status.st_mode & 07777, 0600);
    finish(server);
    remove_directory();
}

static void anything_else_at_the_path_is_refused_and_stays(void) {
    struct stat status;
    char longer[200];
    int file;
    make_directory();
    file = open(path, O_CREAT | O_WRONLY, 0600);
    close(file);
    CHECK_INT(tcpsrv_bind_unix_socket(path, 0, 0), -EEXIST);
    CHECK_INT(lstat(path, &status), 0);
    CHECK(S_ISREG(status.st_mode));
    memset(longer, 'x', sizeof longer);
    longer[sizeof longer - 1] = 0;
    CHECK_INT(tcpsrv_bind_unix_socket(longer, 0, 0), -ENAMETOOLONG);
    CHECK_INT(tcpsrv_bind_unix_socket("", 0, 0), -EINVAL);
    CHECK_INT(tcpsrv_bind_unix_socket("/no/such/place/s", 0, 0), -ENOENT);
    remove_directory();
}

static void a_file_that_is_not_ours_any_more_is_left(void) {
    struct stat status;
    tcpsrv *server;
    int other;
    make_directory();
    server = serve(tcpsrv_bind_unix_socket(path, 0, 0));
    unlink(path);
    other = open(path, O_CREAT | O_WRONLY, 0600);
    close(other);
    finish(server);
    CHECK_INT(lstat(path, &status), 0);
    remove_directory();
}

static void only_the_process_that_bound_it_unlinks_it(void) {
    struct stat status;
    int fd, child_status;
    pid_t pid;
    tcpsrv *server;
    make_directory();
    fd = tcpsrv_bind_unix_socket(path, 0, 0);
    CHECK(fd >= 0);
    pid = fork();
    if (pid == 0) {
        finish(serve(fd));
        _exit(0);
    }
    CHECK_INT(waitpid(pid, &child_status, 0), pid);
    CHECK_INT(child_status, 0);
    CHECK_INT(lstat(path, &status), 0);
    server = serve(fd);
    finish(server);
    CHECK_INT(lstat(path, &status), -1);
    remove_directory();
}

static void talk(const char *name) {
    tcpsrv_connect_options options;
    tcpsrv *server = serve(tcpsrv_bind_unix_socket(name, 0, 0));
    tcpsrv_stream *stream;
    tcpsrv_address address;
    tcpsrv_bytes bytes;
    char text[TCPSRV_ADDRESS_TEXT];
    memset(&options, 0, sizeof options);
    options.path = name;
    stream = tcpsrv_connect(tcpsrv_loop_default(), &options);
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_read_until_close(stream, 0, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "hi");
    CHECK_INT(tcpsrv_peer(stream, &address), 0);
    CHECK_INT(address.family, AF_UNIX);
    CHECK(strncmp(tcpsrv_address_text(&address, text, sizeof text), "unix:", 5) == 0);
    tcpsrv_close(stream);
    finish(server);
}

static void clients_connect_by_path_and_by_abstract_name(void) {
    char name[64];
    make_directory();
    talk(path);
    remove_directory();
    snprintf(name, sizeof name, "@tcpserver-test-%ld", (long)getpid());
    talk(name);
}

static void ready_is_a_line_of_its_own(void) {
    CHECK(tcpsrv__says_ready("READY=1"));
    CHECK(tcpsrv__says_ready("STATUS=NOT READY=1\nREADY=1\nX=2"));
    CHECK(!tcpsrv__says_ready("NOTREADY=1"));
    CHECK(!tcpsrv__says_ready("READY=10\nREADY=1x"));
    CHECK(!tcpsrv__says_ready(""));
}

static void a_socket_that_takes_no_option_any_more_is_a_connection_that_has_ended(void) {
#if defined(__linux__)
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_INT(tcpsrv__socket_flagged(fd), -ECONNABORTED);
    CHECK_INT(fcntl(fd, F_GETFD), -1);
#endif
    CHECK(tcpsrv__accept_skips(-ECONNABORTED));
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(port_0_gives_all_families_the_same_free_port),
        TEST(a_family_can_be_asked_for),
        TEST(ports_out_of_range_are_refused_by_name),
        TEST(a_used_port_says_which),
        TEST(what_is_not_here_cannot_be_bound),
        TEST(too_little_room_for_all_sockets_leaves_none_open),
        TEST(with_reuse_port_two_bind_the_same),
        TEST(without_descriptors_the_step_is_named_and_nothing_leaks),
        TEST(addresses_read_as_people_write_them),
        TEST(every_code_has_a_name),
        TEST(a_unix_socket_has_its_mode_and_goes_with_its_server),
        TEST(a_live_socket_is_not_replaced_and_a_dead_one_is),
        TEST(anything_else_at_the_path_is_refused_and_stays),
        TEST(a_file_that_is_not_ours_any_more_is_left),
        TEST(only_the_process_that_bound_it_unlinks_it),
        TEST(clients_connect_by_path_and_by_abstract_name),
        TEST(ready_is_a_line_of_its_own),
        TEST(a_socket_that_takes_no_option_any_more_is_a_connection_that_has_ended),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
