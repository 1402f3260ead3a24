/* Connecting: names and their lookup, addresses that race, deadlines, failures in words. The
   resolver and the far ends are the tests' own, and so is the clock: 192.0.2.97 and 2001:db8::61
   are named 'a' here, and each does what its test says. */
#include "clock.h"
#include <netdb.h>

/* ---- far ends -------------------------------------------------------------------------------- */

/* What a connect to them does: begins and waits for the test, or ends at once. */
enum { WAITS, ACCEPTS, REFUSES };
static int behaviour[128], far_end[128];
static char tried[64]; /* the addresses tried, a letter each */

static int letter_of(const struct sockaddr *name) {
    const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)name;
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)name;
    uint32_t ip;
    if (name->sa_family == AF_INET6)
        return in6->sin6_addr.s6_addr[0] == 0x20 ? in6->sin6_addr.s6_addr[15] : 0;
    if (name->sa_family != AF_INET) return 0;
    ip = ntohl(in->sin_addr.s_addr);
    return ip >> 8 == 0xc00002 ? (int)(ip & 0xff) : 0;
}

static void fill(int fd) {
    static const char bytes[4096];
    while (send(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) continue;
}

/* Puts one end of a pair in the socket's place. A full one cannot be written to: as the poller sees
   it, the connection is not there yet. */
static void make_far_end(int fd, int letter, int full) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) abort();
    if (test_set_nonblocking(pair[0]) != 0 || test_set_nonblocking(pair[1]) != 0) abort();
    if (full) fill(pair[0]);
    if (dup2(pair[0], fd) < 0) abort();
    close(pair[0]);
    if (far_end[letter]) close(far_end[letter]);
    far_end[letter] = pair[1];
}

TEST_PRIVATE int test_connect(int fd, const struct sockaddr *name, socklen_t size) {
    int letter = letter_of(name);
    if (!letter) return connect(fd, name, size);
    tried[strlen(tried)] = (char)letter;
    if (behaviour[letter] == REFUSES) errno = ECONNREFUSED;
    if (behaviour[letter] == REFUSES) return -1;
    make_far_end(fd, letter, behaviour[letter] == WAITS);
    errno = EINPROGRESS;
    return behaviour[letter] == WAITS ? -1 : 0;
}
#define connect(fd, name, size) test_connect(fd, name, size)

/* ---- the resolver ---------------------------------------------------------------------------- */

static const char *answer;      /* "4a 6c": an IPv4 and an IPv6 address */
static int answer_code;
static int gate[2] = { -1, -1 }, entered[2]; /* with a gate each lookup says that it has begun, and
                                                waits for a byte */
static int lookups, threads_made, threads_refused;
static int ended[2];            /* a byte for each thread that has ended */
static pthread_mutex_t lookups_lock = PTHREAD_MUTEX_INITIALIZER;

static struct addrinfo *one_answer(int family, int letter, int port) {
    size_t size = sizeof(struct addrinfo) + sizeof(struct sockaddr_in6);
    struct addrinfo *info = (struct addrinfo *)calloc(1, size);
    struct sockaddr_in *in = (struct sockaddr_in *)(void *)(info + 1);
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)(void *)(info + 1);
    char text[32];
    snprintf(text, sizeof text, family == AF_INET ? "192.0.2.%d" : "2001:db8::%x", letter);
    info->ai_family = family;
    info->ai_addr = (struct sockaddr *)(info + 1);
    info->ai_addr->sa_family = (sa_family_t)family;
    info->ai_addrlen = (socklen_t)(family == AF_INET ? sizeof *in : sizeof *in6);
    inet_pton(family, text, family == AF_INET ? (void *)&in->sin_addr : (void *)&in6->sin6_addr);
    if (family == AF_INET) in->sin_port = htons((uint16_t)port);
    else in6->sin6_port = htons((uint16_t)port);
    return info;
}

TEST_PRIVATE int test_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
                                  struct addrinfo **list) {
    const char *at;
    char byte;
    if (!answer || (hints->ai_flags & AI_NUMERICHOST)) return getaddrinfo(host, port, hints, list);
    pthread_mutex_lock(&lookups_lock);
    lookups++;
    pthread_mutex_unlock(&lookups_lock);
    if (gate[0] >= 0 && write(entered[1], "", 1) != 1) abort();
    if (gate[0] >= 0 && read(gate[0], &byte, 1) != 1) abort();
    if (answer_code) return answer_code;
    for (at = answer; *at; at += at[2] ? 3 : 2) {
        int family = at[0] == '4' ? AF_INET : AF_INET6;
        if (hints->ai_family && hints->ai_family != family) continue;
        *list = one_answer(family, at[1], atoi(port));
        list = &(*list)->ai_next;
    }
    *list = NULL;
    return 0;
}

TEST_PRIVATE void test_freeaddrinfo(struct addrinfo *list) {
    if (!answer) freeaddrinfo(list);
    while (answer && list) {
        struct addrinfo *next = list->ai_next;
        free(list);
        list = next;
    }
}
#define getaddrinfo(host, port, hints, list) test_getaddrinfo(host, port, hints, list)
#define freeaddrinfo(list) test_freeaddrinfo(list)

static void *(*thread_run)(void *);

static void *test_thread(void *arg) {
    thread_run(arg);
    if (write(ended[1], "", 1) != 1) abort();
    return NULL;
}

TEST_PRIVATE int test_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                                     void *(*run)(void *), void *arg) {
    if (threads_refused) return EAGAIN;
    threads_made++;
    if (!thread_run) thread_run = run;
    return pthread_create(thread, attributes, test_thread, arg);
}
#define pthread_create(thread, attributes, run, arg) \
    test_pthread_create(thread, attributes, run, arg)

#include "test.h"

/* ---- the stage ------------------------------------------------------------------------------- */

static tcpsrv_loop *loop;
static tcpsrv_stream *stream;
static tcpsrv_connect_options options;
static char outcome[256];       /* of the read that waits for the connection */

static void on_ready(tcpsrv_stream *of, int err, tcpsrv_bytes bytes, void *arg) {
    (void)of, (void)bytes, (void)arg;
    snprintf(outcome, sizeof outcome, "%s", !err ? "connected" : err == TCPSRV_ECLOSED ? "closed"
             : err == TCPSRV_ECANCELED ? "cancelled" : tcpsrv_last_error());
}

static void begin(void) {
    virtual_ns = (uint64_t)1000000000u;
    CHECK_INT(pipe(ended), 0);
    loop = tcpsrv_loop_default();
    options.host = "name.example";
    options.port = 80;
}

static void turns(int n) {
    while (n-- > 0) CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
}

static void pass(int ms) {
    virtual_ns += (uint64_t)ms * 1000000u;
    turns(2);
}

static void wait_readable(int fd) {
    struct pollfd entry;
    entry.fd = fd;
    entry.events = POLLIN;
    while (poll(&entry, 1, -1) < 0) CHECK_INT(errno, EINTR);
}

/* Connects and waits for nothing. */
static void start(void) {
    stream = tcpsrv_connect(loop, &options);
    if (!stream) test_end(1, TEST_HERE("%s"), tcpsrv_last_error());
    CHECK_INT(tcpsrv_read(stream, tcpsrv_ready(), on_ready, NULL), 0);
}

/* Connects to what the resolver will say, and waits until it has. */
static void start_at(const char *names) {
    answer = names;
    start();
    CHECK_STR(tried, "");
    wait_readable(loop->waker.read_fd);
    turns(2);
}

static void drain_far_end(int letter) {
    char bytes[4096];
    while (recv(far_end[letter], bytes, sizeof bytes, 0) > 0) continue;
}

static void succeed(int letter) {
    drain_far_end(letter);
    turns(2);
}

static void refuse(int letter) { /* unread bytes make its end an error */
    close(far_end[letter]);
    far_end[letter] = 0;
    turns(2);
}

static int is_closed(int letter) {
    char byte;
    drain_far_end(letter);
    return recv(far_end[letter], &byte, 1, 0) == 0;
}

static void wait_threads(void) {
    char byte;
    for (; threads_made; threads_made--) CHECK_INT(read(ended[0], &byte, 1), 1);
}

static void finish(void) {
    int i;
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    wait_threads();
    for (i = 0; i < 128; i++)
        if (far_end[i]) close(far_end[i]);
    close(ended[0]);
    close(ended[1]);
    if (gate[0] < 0) return;
    close(gate[0]), close(gate[1]), close(entered[0]), close(entered[1]);
}

/* ---- the order of addresses ------------------------------------------------------------------ */

static void all_refuse(const char *names, const char *order) {
    const char *at;
    for (at = order; *at; at++) behaviour[(int)*at] = REFUSES;
    begin();
    start_at(names);
    CHECK_STR(tried, order);
    finish();
}

static void addresses_of_one_family_keep_the_resolvers_order(void) {
    all_refuse("4b 4a 4c", "bac");
}

static void families_take_turns_beginning_with_the_resolvers_first(void) {
    all_refuse("4a 6c 4b 6d", "acbd");
}

static void the_second_family_has_the_second_turn(void) {
    all_refuse("6c 6d 6e 4a 4b", "cadbe");
}

static void an_address_given_twice_is_tried_once(void) {
    all_refuse("4a 4a 6c 4a 6c", "ac");
}

static void a_family_can_be_asked_for(void) {
    options.family = AF_INET6;
    all_refuse("4a 6c 4b 6d", "cd");
}

static void a_sources_family_is_the_only_one_tried(void) {
    options.source_host = "127.0.0.1";
    begin();
    start_at("6c 6d");
    CHECK(strstr(outcome, "resolve name.example:80: ") == outcome);
    finish();
    threads_made = 0;
    all_refuse("6c 4a 6d 4b", "ab");
}

/* ---- the race -------------------------------------------------------------------------------- */

static void the_first_address_alone_is_tried_when_it_answers(void) {
    behaviour['a'] = ACCEPTS;
    begin();
    start_at("4a 4b 6c");
    CHECK_STR(outcome, "connected");
    pass(1000);
    CHECK_STR(tried, "a");
    CHECK_INT(is_closed('a'), 0);
    finish();
}

static void a_single_address_that_fails_is_the_failure(void) {
    begin();
    start_at("4a");
    CHECK_STR(outcome, "");
    refuse('a');
    CHECK_STR(outcome, "connect 192.0.2.97:80: Connection reset by peer");
    finish();
}

static void a_failure_brings_on_the_next_at_once(void) {
    begin();
    start_at("4a 4b");
    CHECK_STR(tried, "a");
    refuse('a');
    CHECK_STR(tried, "ab");
    succeed('b');
    CHECK_STR(outcome, "connected");
    finish();
}

static void when_all_have_failed_the_last_failure_is_told(void) {
    behaviour['b'] = REFUSES;
    begin();
    start_at("4a 4b");
    CHECK_STR(outcome, "");
    refuse('a');
    CHECK_STR(tried, "ab");
    CHECK_STR(outcome, "connect 192.0.2.98:80: Connection refused");
    finish();
}

static void the_next_has_its_turn_after_250_ms_and_not_before(void) {
    begin();
    start_at("4a 4b 4c");
    pass(249);
    CHECK_STR(tried, "a");
    pass(1);
    CHECK_STR(tried, "ab");
    pass(249);
    CHECK_STR(tried, "ab");
    pass(1);
    CHECK_STR(tried, "abc");
    pass(10000);
    CHECK_STR(tried, "abc");
    succeed('b');
    CHECK_STR(outcome, "connected");
    CHECK(is_closed('a') && is_closed('c') && !is_closed('b'));
    finish();
}

static void when_nobody_is_left_the_delay_does_nothing(void) {
    begin();
    start_at("4a 4b");
    refuse('a');
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    pass(1000);
    CHECK_STR(tried, "ab");
    CHECK_STR(outcome, "");
    succeed('b');
    CHECK_STR(outcome, "connected");
    finish();
}

static void a_failure_begins_the_other_family_without_a_delay(void) {
    begin();
    start_at("4a 4b 6c 6d");
    refuse('a');
    CHECK_STR(tried, "ac");
    pass(250);
    CHECK_STR(tried, "acb");
    refuse('b');
    CHECK_STR(tried, "acbd");
    succeed('c');
    CHECK_STR(outcome, "connected");
    CHECK(is_closed('d') && !is_closed('c'));
    finish();
}

static void after_a_win_nothing_else_begins(void) {
    begin();
    start_at("4a 4b 6c 6d");
    pass(250);
    CHECK_STR(tried, "ac");
    succeed('c');
    CHECK_STR(outcome, "connected");
    CHECK_INT(is_closed('a'), 1);
    pass(1000);
    CHECK_STR(tried, "ac");
    finish();
}

static void the_first_may_still_win_after_the_second_began(void) {
    begin();
    start_at("4a 4b 6c 6d");
    pass(250);
    succeed('a');
    CHECK_STR(outcome, "connected");
    CHECK_INT(is_closed('c'), 1);
    pass(1000);
    CHECK_STR(tried, "ac");
    finish();
}

/* Both are ready in the same batch of events: one wins, the other's event meets nobody. */
static void of_two_that_answer_together_one_wins_and_one_is_closed(void) {
    begin();
    start_at("4a 6c");
    pass(250);
    drain_far_end('a');
    drain_far_end('c');
    turns(2);
    CHECK_STR(outcome, "connected");
    CHECK_INT(is_closed('a') + is_closed('c'), 1);
    finish();
}

static void failures_count_only_when_the_last_has_failed(void) {
    begin();
    start_at("4a 4b 6c 6d");
    pass(250);
    refuse('c');
    CHECK_STR(tried, "acb");
    pass(250);
    CHECK_STR(tried, "acbd");
    refuse('d');
    refuse('a');
    CHECK_STR(outcome, "");
    refuse('b');
    CHECK_STR(outcome, "connect 192.0.2.98:80: Connection reset by peer");
    finish();
}

static void a_failure_after_the_win_is_nothing(void) {
    begin();
    start_at("4a 6c");
    pass(250);
    drain_far_end('c');
    close(far_end['a']);
    far_end['a'] = 0;
    turns(3);
    CHECK_STR(outcome, "connected");
    CHECK_STR(tried, "ac");
    finish();
}

/* ---- the deadline of the whole --------------------------------------------------------------- */

static void the_deadline_closes_what_is_under_way_and_begins_nothing(void) {
    options.timeout_ms = 200;
    begin();
    start_at("4a 6c");
    pass(199);
    CHECK_STR(outcome, "");
    pass(1);
    CHECK_STR(outcome, "connect 192.0.2.97:80: timed out");
    CHECK_INT(is_closed('a'), 1);
    pass(1000);
    CHECK_STR(tried, "a");
    finish();
}

static void the_deadline_leaves_a_winner_open(void) {
    options.timeout_ms = 200;
    begin();
    start_at("4a");
    succeed('a');
    CHECK_STR(outcome, "connected");
    pass(1000);
    CHECK_INT(tcpsrv_closed(stream), 0);
    CHECK_INT(is_closed('a'), 0);
    finish();
}

static void the_deadline_ends_a_second_try(void) {
    options.timeout_ms = 200;
    begin();
    start_at("4a 4b");
    refuse('a');
    pass(200);
    CHECK_STR(outcome, "connect 192.0.2.98:80: timed out");
    CHECK_INT(is_closed('b'), 1);
    finish();
}

static void after_the_last_failure_the_deadline_is_harmless(void) {
    options.timeout_ms = 200;
    begin();
    start_at("4a 4b");
    refuse('a');
    refuse('b');
    pass(1000);
    CHECK_STR(outcome, "connect 192.0.2.98:80: Connection reset by peer");
    finish();
}

static void the_deadline_closes_all_that_are_under_way(void) {
    options.timeout_ms = 400;
    begin();
    start_at("4a 6c");
    pass(250);
    CHECK_STR(tried, "ac");
    pass(150);
    CHECK_STR(outcome, "connect [2001:db8::63]:80: timed out");
    CHECK(is_closed('a') && is_closed('c'));
    finish();
}

static void a_win_before_the_deadline_closes_the_loser_only(void) {
    options.timeout_ms = 400;
    begin();
    start_at("4a 6c");
    pass(250);
    succeed('a');
    pass(1000);
    CHECK_STR(outcome, "connected");
    CHECK(is_closed('c') && !is_closed('a'));
    finish();
}

/* ---- looking up ------------------------------------------------------------------------------ */

static void with_a_gate(void) {
    CHECK_INT(pipe(gate), 0);
    CHECK_INT(pipe(entered), 0);
}

static void wait_entered(int n) {
    char byte;
    while (n-- > 0) CHECK_INT(read(entered[0], &byte, 1), 1);
}

static void open_gate(int n) {
    while (n-- > 0) CHECK_INT(write(gate[1], "", 1), 1);
}

static void the_deadline_covers_a_lookup_that_never_ends(void) {
    options.timeout_ms = 50;
    answer = "4a";
    with_a_gate();
    begin();
    start();
    wait_entered(1);
    pass(49);
    CHECK_STR(outcome, "");
    pass(1);
    CHECK_STR(outcome, "resolve name.example:80: timed out");
    open_gate(1);
    wait_threads();
    turns(2);
    CHECK_STR(tried, "");
    finish();
}

static void a_result_after_the_deadline_begins_nothing_on_a_dead_stream(void) {
    options.timeout_ms = 50;
    answer = "4a";
    with_a_gate();
    begin();
    stream = tcpsrv_connect(loop, &options);
    wait_entered(1);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), TCPSRV_ETIMEDOUT);
    CHECK_STR(tcpsrv_last_error(), "resolve name.example:80: timed out");
    open_gate(1);
    wait_threads();
    turns(2);
    CHECK_STR(tried, "");
    CHECK_INT(tcpsrv_write(stream, "x", 1), TCPSRV_ETIMEDOUT);
    tcpsrv_close(stream);
    finish();
}

static void the_loop_goes_on_while_a_name_is_looked_up(void) {
    behaviour['a'] = ACCEPTS;
    answer = "4a";
    with_a_gate();
    begin();
    start();
    turns(10);
    CHECK_STR(outcome, "");
    open_gate(1);
    wait_readable(loop->waker.read_fd);
    turns(2);
    CHECK_STR(outcome, "connected");
    finish();
}

static void a_failed_lookup_is_told_with_the_name(void) {
    char expected[128];
    answer_code = EAI_NONAME;
    snprintf(expected, sizeof expected, "resolve name.example:80: %s", gai_strerror(EAI_NONAME));
    begin();
    start_at("4a");
    CHECK_STR(outcome, expected);
    finish();
}

static void a_name_without_usable_addresses_is_a_failure(void) {
    begin();
    options.family = AF_INET6;
    start_at("4a");
    CHECK(strstr(outcome, "resolve name.example:80: ") == outcome);
    finish();
}

static void every_call_that_waits_names_the_step_that_failed(void) {
    tcpsrv_bytes bytes;
    char text[128];
    behaviour['a'] = REFUSES;
    answer = "4a";
    begin();
    stream = tcpsrv_connect(loop, &options);
    CHECK_INT(tcpsrv_read_some(stream, 0, &bytes), -ECONNREFUSED);
    snprintf(text, sizeof text, "%s", tcpsrv_last_error());
    CHECK_STR(text, "connect 192.0.2.97:80: Connection refused");
    CHECK_INT(tcpsrv_error(stream), -ECONNREFUSED);
    CHECK_INT(tcpsrv_flush(stream), -ECONNREFUSED);
    CHECK_STR(tcpsrv_last_error(), text);
    CHECK_INT(tcpsrv_write(stream, "x", 1), -ECONNREFUSED);
    CHECK_STR(tcpsrv_last_error(), text);
    tcpsrv_close(stream);
    finish();
}

static void on_closed(tcpsrv_stream *of, int result, size_t unsent, void *arg) {
    (void)of, (void)arg;
    snprintf(outcome, sizeof outcome, "%d, %d unsent: %s", result, (int)unsent,
             tcpsrv_last_error());
}

static void a_failure_tells_on_close_what_was_not_sent(void) {
    behaviour['a'] = REFUSES;
    answer = "4a";
    begin();
    stream = tcpsrv_connect(loop, &options);
    CHECK_INT(tcpsrv_on_close(stream, on_closed, NULL), 0);
    CHECK_INT(tcpsrv_write(stream, "hello", 5), 0);
    wait_readable(loop->waker.read_fd);
    turns(3);
    CHECK(strstr(outcome, ", 5 unsent: connect 192.0.2.97:80: Connection refused") != NULL);
    finish();
}

static void what_was_written_before_arrives_and_answers_come_back(void) {
    tcpsrv_bytes bytes;
    tcpsrv_address peer;
    char text[TCPSRV_ADDRESS_TEXT];
    behaviour['c'] = ACCEPTS;
    answer = "6c";
    begin();
    stream = tcpsrv_connect(loop, &options);
    CHECK_INT(tcpsrv_fd(stream), -1);
    CHECK_INT(tcpsrv_local(stream, &peer), -ENOTCONN);
    CHECK_INT(tcpsrv_set_nodelay(stream, 1), -ENOTCONN);
    CHECK_INT(tcpsrv_write(stream, "early", 5), 0);
    CHECK_INT(tcpsrv_flush(stream), 0);
    CHECK_INT(recv(far_end['c'], text, sizeof text, 0), 5);
    CHECK_INT(send(far_end['c'], "late\n", 5, 0), 5);
    CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &bytes), 0);
    CHECK_MEM(bytes.data, bytes.size, "late\n");
    CHECK(tcpsrv_fd(stream) >= 0);
    CHECK_INT(tcpsrv_peer(stream, &peer), 0);
    CHECK_STR(tcpsrv_address_text(&peer, text, sizeof text), "[2001:db8::63]:80");
    tcpsrv_close(stream);
    finish();
}

static void closing_while_a_name_is_looked_up_waits_for_nothing(void) {
    answer = "4a";
    with_a_gate();
    begin();
    start();
    wait_entered(1);
    tcpsrv_close(stream);
    turns(2);
    CHECK_STR(outcome, "closed");
    open_gate(1);
    wait_threads();
    turns(2);
    CHECK_STR(tried, "");
    finish();
}

static void aborting_while_a_name_is_looked_up_waits_for_nothing(void) {
    answer = "4a";
    with_a_gate();
    begin();
    start();
    wait_entered(1);
    tcpsrv_abort(stream);
    turns(2);
    open_gate(1);
    wait_threads();
    turns(2);
    CHECK_STR(tried, "");
    finish();
}

static void a_loop_may_be_freed_while_names_are_looked_up(void) {
    int i;
    answer = "4a";
    with_a_gate();
    begin();
    for (i = 0; i < 20; i++) start(); /* more than there are threads */
    wait_entered(TCPSRV__MAX_HELPERS);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    CHECK_STR(outcome, "cancelled");
    loop = tcpsrv_loop_default();
    open_gate(20);
    wait_threads();
    CHECK_STR(tried, "");
    finish();
}

static void a_loop_may_be_freed_before_it_takes_a_result(void) {
    answer = "4a";
    begin();
    start();
    wait_threads();
    finish();
    CHECK_STR(tried, "");
}

static void a_loop_may_be_freed_while_addresses_race(void) {
    begin();
    start_at("4a 6c");
    pass(250);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
    CHECK(is_closed('a') && is_closed('c'));
    loop = tcpsrv_loop_default();
    finish();
}

static void closing_during_a_race_closes_all(void) {
    begin();
    start_at("4a 6c");
    pass(250);
    tcpsrv_close(stream);
    turns(2);
    CHECK(is_closed('a') && is_closed('c'));
    finish();
}

static void a_close_with_output_waits_for_the_connection_and_flushes(void) {
    char text[16];
    begin();
    start_at("4a");
    CHECK_INT(tcpsrv_write(stream, "bye", 3), 0);
    tcpsrv_close(stream);
    turns(2);
    drain_far_end('a');
    turns(3);
    CHECK_INT(recv(far_end['a'], text, sizeof text, 0), 3);
    CHECK_INT(recv(far_end['a'], text, sizeof text, 0), 0);
    finish();
}

/* ---- helpers --------------------------------------------------------------------------------- */

static int connected;

static void on_one_connected(tcpsrv_stream *of, int err, tcpsrv_bytes bytes, void *arg) {
    (void)bytes, (void)arg;
    CHECK_INT(err, 0);
    connected++;
    tcpsrv_close(of);
}

static void more_names_than_helpers_are_all_looked_up(void) {
    int i;
    answer = "4a";
    behaviour['a'] = ACCEPTS;
    with_a_gate();
    begin();
    virtual_ns = 0;
    for (i = 0; i < 50; i++) {
        stream = tcpsrv_connect(loop, &options);
        CHECK_INT(tcpsrv_read(stream, tcpsrv_ready(), on_one_connected, NULL), 0);
    }
    CHECK_INT(threads_made, TCPSRV__MAX_HELPERS);
    open_gate(50);
    for (i = 0; connected < 50; i++) {
        CHECK_INT(tcpsrv_loop_poll(loop, -1), 0);
        memset(tried, 0, sizeof tried);
    }
    finish();
}

static void a_lookup_that_nobody_works_on_yet_is_never_begun_once_cancelled(void) {
    tcpsrv_stream *last;
    int i;
    answer = "4a";
    with_a_gate();
    begin();
    for (i = 0; i < TCPSRV__MAX_HELPERS; i++) start();
    wait_entered(TCPSRV__MAX_HELPERS);
    last = tcpsrv_connect(loop, &options);
    CHECK(last != NULL);
    tcpsrv_abort(last);
    open_gate(TCPSRV__MAX_HELPERS);
    wait_threads();
    CHECK_INT(lookups, TCPSRV__MAX_HELPERS);
    finish();
}

static void numeric_addresses_and_paths_need_no_thread(void) {
    behaviour['a'] = behaviour['c'] = ACCEPTS;
    answer = "4b";
    begin();
    options.host = "192.0.2.97";
    start();
    turns(2);
    CHECK_STR(outcome, "connected");
    options.host = "2001:db8::63";
    start();
    options.path = "/no/such/path";
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK_STR(tcpsrv_last_error(), "connect unix:/no/such/path: No such file or directory");
    CHECK_STR(tried, "ac");
    CHECK_INT(threads_made, 0);
    finish();
}

/* Whether the host was taken for a name: looked up, or refused by the lookup. */
static int is_a_name(const char *host) {
    int before = threads_made;
    options.host = host;
    stream = tcpsrv_connect(loop, &options);
    if (stream) tcpsrv_abort(stream);
    turns(2);
    return threads_made > before;
}

static void only_what_is_numeric_is_connected_without_a_lookup(void) {
    static const char *numeric[] = { "127.0.0.1", "::1", "192.0.2.97", "2620:0:1cfe:face:b00c::3",
                                     "2001:db8:0:0:0:0:0:61" };
    static const char *names[] = { "www.example.com", "localhost", "4.4.4.4<", "4.4.4.4 junk",
                                   " 127.0.0.1", " ", "\n", "::1:g", "1.2.3.4.5" };
    char letters[101];
    size_t i;
    memset(letters, 'x', sizeof letters - 1);
    letters[sizeof letters - 1] = 0;
    behaviour['a'] = REFUSES;
    answer = "4a";
    begin();
    for (i = 0; i < sizeof numeric / sizeof *numeric; i++) CHECK_INT(is_a_name(numeric[i]), 0);
    for (i = 0; i < sizeof names / sizeof *names; i++) CHECK_INT(is_a_name(names[i]), 1);
    CHECK_INT(is_a_name(letters), 1);
    finish();
}

static void without_a_thread_a_name_is_refused_at_once(void) {
    threads_refused = 1;
    begin();
    answer = "4a";
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "resolve name.example:80: ") == tcpsrv_last_error());
    CHECK(strstr(tcpsrv_last_error(), strerror(EAGAIN)) != NULL);
    turns(2);
    finish();
}

static sigset_t helpers_mask;

static void *note_mask(void *arg) {
    pthread_sigmask(SIG_SETMASK, NULL, &helpers_mask);
    return arg;
}

static void helpers_leave_signals_to_the_program(void) {
    sigset_t before, after;
    begin();
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    CHECK_INT(tcpsrv__sys_thread(note_mask, NULL), 0);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    wait_threads();
    CHECK_INT(sigismember(&after, SIGTERM), sigismember(&before, SIGTERM));
    CHECK(sigismember(&helpers_mask, SIGTERM) && sigismember(&helpers_mask, SIGCHLD));
    finish();
}

/* The child has neither the parent's threads nor its loop: it makes its own. */
static int child_connects(void) {
    tcpsrv_loop *own = tcpsrv_loop_new();
    int err;
    gate[0] = -1;
    if (TCPSRV__TSAN) options.host = "192.0.2.97"; /* it has no threads in such a child */
    behaviour['a'] = ACCEPTS;
    stream = own ? tcpsrv_connect(own, &options) : NULL;
    err = stream ? tcpsrv_await(stream, tcpsrv_ready(), NULL) : -1;
    if (stream) tcpsrv_close(stream);
    return err ? err : tcpsrv_loop_free(own);
}

static void a_fork_with_a_lookup_running_is_safe(void) {
    int status = -1;
    pid_t pid;
    answer = "4a";
    with_a_gate();
    begin();
    virtual_ns = 0;
    start();
    wait_entered(1);
    pid = fork();
    if (pid == 0) _exit(child_connects() != 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
    open_gate(1);
    wait_readable(loop->waker.read_fd);
    turns(2);
    succeed('a');
    CHECK_STR(outcome, "connected");
    finish();
}

/* ---- loopback, for real ---------------------------------------------------------------------- */

static int accepts[2], accept_count;

static void listen_on(const char *address, int family) {
    tcpsrv_bind_options bind_options;
    memset(&bind_options, 0, sizeof bind_options);
    bind_options.family = family;
    accept_count = tcpsrv_bind_sockets(0, address, &bind_options, accepts, 2);
    if (accept_count < 0) SKIP("a host without that address family");
    virtual_ns = 0;
    options.port = tcpsrv__local_port(accepts[0]);
}

static void unlisten(void) {
    while (accept_count > 0) close(accepts[--accept_count]);
}

/* The original's exchange: hello, 5 bytes read by the server. */
static void says_hello(const char *host, int family) {
    char text[8];
    int i, fd = -1;
    options.host = host;
    options.family = family;
    stream = tcpsrv_connect(loop, &options);
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_write(stream, "hello", 5), 0);
    if (tcpsrv_flush(stream) != 0) test_end(1, TEST_HERE("%s"), tcpsrv_last_error());
    for (i = 0; i < accept_count && fd < 0; i++) fd = accept(accepts[i], NULL, NULL);
    CHECK(fd >= 0);
    CHECK_INT(recv(fd, text, sizeof text, 0), 5);
    close(fd);
    tcpsrv_abort(stream);
}

static void ipv4_is_reached_by_address_and_by_name(void) {
    begin();
    listen_on("127.0.0.1", AF_INET);
    says_hello("127.0.0.1", 0);
    says_hello("localhost", AF_INET);
    unlisten();
    finish();
}

static void ipv6_is_reached_by_address_and_by_name(void) {
    begin();
    listen_on("::1", AF_INET6);
    says_hello("::1", 0);
    says_hello("::1", AF_INET6);
    unlisten();
    finish();
}

static void a_server_on_all_families_is_reached_by_all(void) {
    begin();
    listen_on("localhost", 0);
    says_hello("127.0.0.1", 0);
    if (accept_count > 1) says_hello("::1", 0);
    says_hello("localhost", 0);
    unlisten();
    finish();
}

static void a_refusing_port_is_an_error(void) {
    begin();
    listen_on("127.0.0.1", AF_INET);
    unlisten();
    options.host = "localhost";
    options.family = AF_INET;
    stream = tcpsrv_connect(loop, &options);
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), -ECONNREFUSED);
    CHECK(strstr(tcpsrv_last_error(), "connect 127.0.0.1:") == tcpsrv_last_error());
    tcpsrv_close(stream);
    finish();
}

/* The kernel drops what a full backlog has no room for, and says nothing. */
static void a_deadline_ends_a_connection_that_nobody_answers(void) {
    int fds[8], n, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    uint64_t start_ns;
    begin();
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK_INT(bind(listener, (struct sockaddr *)&address, size), 0);
    CHECK_INT(listen(listener, 0), 0);
    CHECK_INT(getsockname(listener, (struct sockaddr *)&address, &size), 0);
    for (n = 0; n < 8; n++) {
        fds[n] = socket(AF_INET, SOCK_STREAM, 0);
        test_set_nonblocking(fds[n]);
        if (connect(fds[n], (struct sockaddr *)&address, size) != 0) CHECK_INT(errno, EINPROGRESS);
    }
    virtual_ns = 0;
    options.host = "127.0.0.1";
    options.port = ntohs(address.sin_port);
    options.timeout_ms = 100;
    start_ns = test_ns();
    stream = tcpsrv_connect(loop, &options);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), TCPSRV_ETIMEDOUT);
    CHECK(strstr(tcpsrv_last_error(), ": timed out") != NULL);
    CHECK(test_ns() - start_ns >= 100 * 1000000u);
    tcpsrv_close(stream);
    while (n > 0) close(fds[--n]);
    close(listener);
    finish();
}

static void a_source_address_is_bound_and_a_foreign_one_refused(void) {
    tcpsrv_address local;
    begin();
    listen_on("127.0.0.1", AF_INET);
    options.host = "127.0.0.1";
    options.source_host = "127.0.0.9";
    stream = tcpsrv_connect(loop, &options);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), 0);
    CHECK_INT(tcpsrv_local(stream, &local), 0);
    CHECK_INT(local.ip[3], 9);
    tcpsrv_abort(stream);
    options.source_host = "8.8.8.8";
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "bind source 8.8.8.8:0: ") == tcpsrv_last_error());
    options.source_host = "no.number";
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), "bind source no.number:0: ") == tcpsrv_last_error());
    unlisten();
    finish();
}

static void a_source_port_is_bound_and_a_used_one_refused(void) {
    tcpsrv_address local;
    int used;
    begin();
    listen_on("127.0.0.1", AF_INET);
    used = tcpsrv__local_port(accepts[0]);
    options.host = "127.0.0.1";
    options.source_port = used;
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), strerror(EADDRINUSE)) != NULL);
    CHECK_INT(tcpsrv_bind_sockets(0, "127.0.0.1", NULL, &options.source_port, 1), 1);
    used = options.source_port; /* a descriptor until its port is known */
    options.source_port = tcpsrv__local_port(used);
    close(used);
    stream = tcpsrv_connect(loop, &options);
    CHECK(stream != NULL);
    CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), 0);
    CHECK_INT(tcpsrv_local(stream, &local), 0);
    CHECK_INT(local.port, options.source_port);
    tcpsrv_abort(stream);
    unlisten();
    finish();
}

static void refused_words(const char *words) {
    CHECK(tcpsrv_connect(loop, &options) == NULL);
    CHECK(strstr(tcpsrv_last_error(), words) == tcpsrv_last_error());
}

/* From a port to the same port, where nobody listens. */
static void a_connection_that_meets_itself_is_refused(void) {
    begin();
    listen_on("127.0.0.1", AF_INET);
    unlisten();
    options.host = options.source_host = "127.0.0.1";
    options.source_port = options.port;
    stream = tcpsrv_connect(loop, &options);
    if (stream) CHECK_INT(tcpsrv_await(stream, tcpsrv_ready(), NULL), -ECONNREFUSED);
    CHECK(strstr(tcpsrv_last_error(), "connect 127.0.0.1:") == tcpsrv_last_error());
    CHECK(strstr(tcpsrv_last_error(), "Connection refused") != NULL);
    if (stream) tcpsrv_close(stream);
    finish();
}

static void what_cannot_be_meant_is_refused_at_once(void) {
    begin();
    options.port = 0;
    refused_words("connect name.example:0: Invalid argument");
    options.port = 65536;
    refused_words("connect name.example:65536: Invalid argument");
    options.port = 80;
    options.source_port = -1;
    refused_words("connect name.example:80: Invalid argument");
    options.source_port = 0;
    options.host = "";
    refused_words("connect (no host):80: Invalid argument");
    options.host = NULL;
    refused_words("connect (no host):80: Invalid argument");
    finish();
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* 1 once no allocation is left to fail. */
static int try_with_failure(int nth) {
    char text[8];
    int done;
    memset(tried, 0, sizeof tried);
    test_fail_alloc_at = nth;
    stream = tcpsrv_connect(loop, &options);
    if (stream && tcpsrv_write(stream, "hello", 5) == 0 && tcpsrv_flush(stream) == 0) {
        CHECK_INT(recv(far_end['a'], text, sizeof text, 0), 5);
        tcpsrv_abort(stream);
    } else {
        CHECK(strstr(tcpsrv_last_error(), strerror(ENOMEM)) != NULL);
        if (stream) tcpsrv_abort(stream);
    }
    done = test_fail_alloc_at != 0;
    test_fail_alloc_at = 0;
    turns(2);
    if (far_end['a']) close(far_end['a']);
    far_end['a'] = 0;
    wait_threads();
    return done;
}

static void any_failed_allocation_is_a_code(void) {
    int i = 1;
    behaviour['a'] = ACCEPTS;
    answer = "4a 6c";
    options.timeout_ms = 60000;
    begin();
    virtual_ns = 0;
    while (!try_with_failure(i)) CHECK(++i < 100);
    CHECK(i > 5);
    finish();
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(addresses_of_one_family_keep_the_resolvers_order),
        TEST(families_take_turns_beginning_with_the_resolvers_first),
        TEST(the_second_family_has_the_second_turn),
        TEST(an_address_given_twice_is_tried_once),
        TEST(a_family_can_be_asked_for),
        TEST(a_sources_family_is_the_only_one_tried),
        TEST(the_first_address_alone_is_tried_when_it_answers),
        TEST(a_single_address_that_fails_is_the_failure),
        TEST(a_failure_brings_on_the_next_at_once),
        TEST(when_all_have_failed_the_last_failure_is_told),
        TEST(the_next_has_its_turn_after_250_ms_and_not_before),
        TEST(when_nobody_is_left_the_delay_does_nothing),
        TEST(a_failure_begins_the_other_family_without_a_delay),
        TEST(after_a_win_nothing_else_begins),
        TEST(the_first_may_still_win_after_the_second_began),
        TEST(of_two_that_answer_together_one_wins_and_one_is_closed),
        TEST(failures_count_only_when_the_last_has_failed),
        TEST(a_failure_after_the_win_is_nothing),
        TEST(the_deadline_closes_what_is_under_way_and_begins_nothing),
        TEST(the_deadline_leaves_a_winner_open),
        TEST(the_deadline_ends_a_second_try),
        TEST(after_the_last_failure_the_deadline_is_harmless),
        TEST(the_deadline_closes_all_that_are_under_way),
        TEST(a_win_before_the_deadline_closes_the_loser_only),
        TEST(the_deadline_covers_a_lookup_that_never_ends),
        TEST(a_result_after_the_deadline_begins_nothing_on_a_dead_stream),
        TEST(the_loop_goes_on_while_a_name_is_looked_up),
        TEST(a_failed_lookup_is_told_with_the_name),
        TEST(a_name_without_usable_addresses_is_a_failure),
        TEST(every_call_that_waits_names_the_step_that_failed),
        TEST(a_failure_tells_on_close_what_was_not_sent),
        TEST(what_was_written_before_arrives_and_answers_come_back),
        TEST(closing_while_a_name_is_looked_up_waits_for_nothing),
        TEST(aborting_while_a_name_is_looked_up_waits_for_nothing),
        TEST(a_loop_may_be_freed_while_names_are_looked_up),
        TEST(a_loop_may_be_freed_before_it_takes_a_result),
        TEST(a_loop_may_be_freed_while_addresses_race),
        TEST(closing_during_a_race_closes_all),
        TEST(a_close_with_output_waits_for_the_connection_and_flushes),
        TEST(more_names_than_helpers_are_all_looked_up),
        TEST(a_lookup_that_nobody_works_on_yet_is_never_begun_once_cancelled),
        TEST(numeric_addresses_and_paths_need_no_thread),
        TEST(only_what_is_numeric_is_connected_without_a_lookup),
        TEST(without_a_thread_a_name_is_refused_at_once),
        TEST(helpers_leave_signals_to_the_program),
        TEST(a_fork_with_a_lookup_running_is_safe),
        TEST(ipv4_is_reached_by_address_and_by_name),
        TEST(ipv6_is_reached_by_address_and_by_name),
        TEST(a_server_on_all_families_is_reached_by_all),
        TEST(a_refusing_port_is_an_error),
        TEST(a_deadline_ends_a_connection_that_nobody_answers),
        TEST(a_source_address_is_bound_and_a_foreign_one_refused),
        TEST(a_source_port_is_bound_and_a_used_one_refused),
        TEST(a_connection_that_meets_itself_is_refused),
        TEST(what_cannot_be_meant_is_refused_at_once),
        TEST(any_failed_allocation_is_a_code),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
