/* The loop: turns, timers, posted calls, signals, watches. */
#include "support.h"
static volatile int pids_counted, pids_asked; /* only while no other thread runs */
#define getpid() (pids_counted ? pids_asked++ : 0, getpid())
#include "clock.h"
#include "test.h"

#define MS 1000000u

static tcpsrv_loop *loop;

static void begin(void) {
    loop = tcpsrv_loop_default();
    CHECK(loop != NULL);
}

static void begin_virtual(void) {
    virtual_ns = 1000000u * (uint64_t)MS;
    begin();
}

static void end(void) {
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

/* What has run, a letter each. */
static char trace[256];

static void note(void *text) {
    size_t n = strlen(trace);
    if (n + 1 < sizeof trace) trace[n] = *(const char *)text;
}

static void stop(void *arg) {
    (void)arg;
    tcpsrv_loop_stop(loop);
}

static void count_up(void *counter) {
    ++*(int *)counter;
}

/* The argument of a call that only notes is a text that nobody writes to. */
static void *letter(const char *text) {
    return (void *)(uintptr_t)text;
}

/* ---- loops ----------------------------------------------------------------------------------- */

static void the_default_loop_is_the_same_at_each_call(void) {
    begin();
    CHECK(tcpsrv_loop_default() == loop);
    end();
}

static void a_freed_default_loop_is_made_anew(void) {
    int count = 0;
    begin();
    end();
    begin();
    CHECK(tcpsrv_call_soon(loop, count_up, &count) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 1);
    end();
}

static void further_loops_stand_beside_the_default_one(void) {
    tcpsrv_loop *other = tcpsrv_loop_new();
    int here = 0, there = 0;
    begin();
    CHECK(other != NULL && other != loop);
    tcpsrv_call_soon(loop, count_up, &here);
    tcpsrv_call_soon(other, count_up, &there);
    CHECK_INT(tcpsrv_loop_poll(other, 0), 0);
    CHECK_INT(there, 1);
    CHECK_INT(here, 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(here, 1);
    CHECK_INT(tcpsrv_loop_free(other), 0);
    end();
}

static void run_returns_0_after_stop_and_runs_again(void) {
    int i;
    begin();
    for (i = 0; i < 3; i++) {
        tcpsrv_call_soon(loop, stop, NULL);
        CHECK_INT(tcpsrv_loop_run(loop), 0);
    }
    end();
}

static void stop_lets_the_turn_end(void) {
    int count = 0;
    begin();
    tcpsrv_call_soon(loop, stop, NULL);
    tcpsrv_call_soon(loop, count_up, &count);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(count, 1);
    end();
}

static void stop_before_run_makes_it_return_at_once(void) {
    int count = 0;
    begin();
    tcpsrv_loop_stop(loop);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    tcpsrv_call_soon(loop, count_up, &count);
    tcpsrv_call_later(loop, 1, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0); /* the stop was for one run only */
    CHECK_INT(count, 1);
    end();
}

static void reenter(void *arg) {
    tcpsrv_loop *other = (tcpsrv_loop *)arg;
    CHECK_INT(tcpsrv_loop_run(loop), TCPSRV_EBUSY);
    CHECK(tcpsrv_last_error()[0] != 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_free(loop), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_run(other), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_poll(other, 0), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_free(other), TCPSRV_EBUSY);
    note(letter("x"));
}

static void run_poll_and_free_are_refused_in_callbacks(void) {
    tcpsrv_loop *other = tcpsrv_loop_new();
    begin();
    tcpsrv_call_soon(loop, reenter, other);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "x");
    CHECK_INT(tcpsrv_loop_free(other), 0);
    end();
}

static void a_forked_child_may_not_turn_its_parents_loop(void) {
    int status = -1;
    pid_t pid;
    begin();
    pid = fork();
    if (pid == 0) {
        int refused = tcpsrv_loop_run(loop) == TCPSRV_EBUSY &&
                      tcpsrv_loop_poll(loop, 0) == TCPSRV_EBUSY;
        _exit(refused ? 0 : 1);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_INT(status, 0);
    tcpsrv__sys_unmap_mark(loop->mark); /* as where the system has no such memory */
    loop->mark = NULL;
    pid = fork();
    if (pid == 0) _exit(tcpsrv_loop_poll(loop, 0) == TCPSRV_EBUSY ? 0 : 1);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_INT(status, 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
}

static void poll_asks_nobody_whose_process_it_is(void) {
    int before;
    begin();
    before = pids_asked;
    pids_counted = 1;
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK(!loop->mark || pids_asked == before);
    end();
}

static void poll_with_0_does_what_is_ready_and_never_waits(void) {
    int count = 0;
    begin_virtual();
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_call_soon(loop, count_up, &count);
    tcpsrv_call_later(loop, 1, count_up, &count);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 1);
    CHECK(virtual_ns == 1000000u * (uint64_t)MS);
    end();
}

static void poll_waits_as_long_as_it_may_and_no_longer_than_the_next_timer(void) {
    int count = 0;
    uint64_t start;
    begin_virtual();
    start = virtual_ns;
    CHECK_INT(tcpsrv_loop_poll(loop, 30), 0);
    CHECK_INT(virtual_ns - start, 30 * MS);
    tcpsrv_call_later(loop, 20, count_up, &count);
    CHECK_INT(tcpsrv_loop_poll(loop, 5), 0);
    CHECK_INT(count, 0);
    CHECK_INT(tcpsrv_loop_poll(loop, -1), 0);
    CHECK_INT(count, 1);
    CHECK_INT(virtual_ns - start, 50 * MS);
    end();
}

static void timeout_tells_the_milliseconds_to_the_next_deadline(void) {
    int64_t id;
    int count = 0;
    begin_virtual();
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    id = tcpsrv_call_later(loop, 70, count_up, &count);
    CHECK_INT(tcpsrv_loop_timeout(loop), 70);
    virtual_ns += 30 * MS;
    CHECK_INT(tcpsrv_loop_timeout(loop), 40);
    tcpsrv_call_soon(loop, count_up, &count);
    CHECK_INT(tcpsrv_loop_timeout(loop), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_cancel(loop, id);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    CHECK_INT(count, 1);
    end();
}

static void now_is_read_once_a_turn(void) {
    uint64_t before;
    int count = 0;
    begin_virtual();
    tcpsrv_call_soon(loop, count_up, &count);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    before = tcpsrv_loop_now(loop);
    CHECK(before == virtual_ns);
    virtual_ns += 5 * MS;
    CHECK(tcpsrv_loop_now(loop) == before);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK(tcpsrv_loop_now(loop) == before + 5 * MS);
    end();
}

static void an_idle_loop_sleeps(void) {
    begin();
    tcpsrv_call_later(loop, 60, stop, NULL);
    counts_waits = 1;
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK(wait_count <= 3);
    end();
}

#if defined(TCPSERVER_USE_POLL)
static void poll_has_no_descriptor_for_a_foreign_loop(void) {
    begin();
    CHECK_INT(tcpsrv_loop_fd(loop), -ENOTSUP);
    end();
}
#else
static int is_readable(int fd, int timeout_ms) {
    struct pollfd entry;
    entry.fd = fd;
    entry.events = POLLIN;
    entry.revents = 0;
    return poll(&entry, 1, timeout_ms) == 1;
}

static void on_byte(int fd, int events, void *arg) {
    char byte;
    CHECK_INT(events, TCPSRV_READ);
    CHECK_INT(read(fd, &byte, 1), 1);
    ++*(int *)arg;
}

static void a_loop_lives_inside_a_foreign_one(void) {
    int fds[2], count = 0, fd;
    begin();
    fd = tcpsrv_loop_fd(loop);
    CHECK(fd >= 0);
    CHECK_INT(test_pair(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_byte, &count) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK(!is_readable(fd, 0));
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK(is_readable(fd, 1000));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 1);
    CHECK(!is_readable(fd, 0));
    CHECK_INT(tcpsrv_post(loop, count_up, &count), 0);
    CHECK(is_readable(fd, 1000));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 2);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    end();
    close(fds[0]);
    close(fds[1]);
}
#endif

static void *run_a_loop_of_its_own(void *arg) {
    int64_t count = 0;
    int i, ticks = 0;
    for (i = 0; i < 10; i++) {
        tcpsrv_loop *own = i % 2 ? tcpsrv_loop_new() : tcpsrv_loop_default();
        if (!own || tcpsrv_call_every(own, 1, count_up, &ticks) <= 0) return NULL;
        while (ticks < (i + 1) * 2) tcpsrv_loop_poll(own, 100);
        if (tcpsrv_loop_free(own) == 0) count++;
    }
    *(int64_t *)arg = count;
    return arg;
}

static void loops_in_two_threads_share_nothing(void) {
    pthread_t threads[2];
    int64_t counts[2] = { 0, 0 };
    int i;
    for (i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&threads[i], NULL, run_a_loop_of_its_own, &counts[i]), 0);
    for (i = 0; i < 2; i++) CHECK_INT(pthread_join(threads[i], NULL), 0);
    CHECK_INT(counts[0], 10);
    CHECK_INT(counts[1], 10);
}

static void free_drops_what_hangs_on_the_loop(void) {
    int fds[2], count = 0;
    begin();
    CHECK_INT(test_pair(fds), 0);
    tcpsrv_call_soon(loop, count_up, &count);
    tcpsrv_call_later(loop, 0, count_up, &count);
    tcpsrv_call_every(loop, 1, count_up, &count);
    tcpsrv_post(loop, count_up, &count);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, (tcpsrv_watch_fn *)NULL, NULL) > 0);
    end();
    CHECK_INT(count, 0);
    CHECK_INT(close(fds[0]), 0);
    CHECK_INT(close(fds[1]), 0);
}

/* ---- errors ---------------------------------------------------------------------------------- */

static void strerror_names_every_code(void) {
    static const int codes[] = { TCPSRV_EOF, TCPSRV_ECLOSED, TCPSRV_ECANCELED, TCPSRV_EBUSY,
                                 TCPSRV_ETOOBIG, TCPSRV_EBUFFULL, TCPSRV_ETIMEDOUT,
                                 TCPSRV_ENOTCORO, TCPSRV_EREFUSED, TCPSRV_ERESOLVE - 2 };
    char texts[TEST_COUNT(codes)][200];
    int i, j;
    for (i = 0; i < TEST_COUNT(codes); i++) {
        snprintf(texts[i], sizeof texts[i], "%s", tcpsrv_strerror(codes[i]));
        CHECK(texts[i][0] != 0);
        for (j = 0; j < i; j++) CHECK(strcmp(texts[i], texts[j]) != 0);
    }
    CHECK_STR(tcpsrv_strerror(-EACCES), strerror(EACCES));
    CHECK(tcpsrv_strerror(0) != NULL);
    CHECK(tcpsrv_strerror(-99999) != NULL);
}

static void *fail_in_a_thread(void *arg) {
    if (tcpsrv_last_error()[0] != 0) return NULL;
    if (tcpsrv_call_every(loop, 0, stop, NULL) != -EINVAL) return NULL;
    return strstr(tcpsrv_last_error(), strerror(EINVAL)) ? arg : NULL;
}

static void last_error_is_a_sentence_of_the_threads_own(void) {
    pthread_t thread;
    void *result = NULL;
    begin();
    CHECK_STR(tcpsrv_last_error(), "");
    CHECK_INT(pthread_create(&thread, NULL, fail_in_a_thread, trace), 0);
    CHECK_INT(pthread_join(thread, &result), 0);
    CHECK(result == trace);
    CHECK_STR(tcpsrv_last_error(), "");
    CHECK_INT(tcpsrv_watch_fd(loop, -1, TCPSRV_READ, NULL, NULL), -EBADF);
    CHECK(strstr(tcpsrv_last_error(), strerror(EBADF)) != NULL);
    end();
}

/* ---- timers ---------------------------------------------------------------------------------- */

static void soon_runs_on_the_next_turn_in_the_order_of_the_calls(void) {
    begin();
    tcpsrv_call_soon(loop, note, letter("a"));
    tcpsrv_call_soon(loop, note, letter("b"));
    tcpsrv_call_soon(loop, note, letter("c"));
    CHECK_STR(trace, "");
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abc");
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abc");
    end();
}

static void equal_deadlines_run_in_the_order_of_the_calls(void) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz";
    int i;
    begin_virtual();
    for (i = 0; i < 26; i++) CHECK(tcpsrv_call_later(loop, 7, note, letter(letters + i)) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, -1), 0);
    CHECK_STR(trace, letters);
    end();
}

static void timers_run_in_the_order_of_their_deadlines(void) {
    begin_virtual();
    tcpsrv_call_later(loop, 30, note, letter("d"));
    tcpsrv_call_later(loop, 10, note, letter("b"));
    tcpsrv_call_later(loop, 20, note, letter("c"));
    tcpsrv_call_later(loop, 5, note, letter("a"));
    tcpsrv_call_later(loop, 40, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_STR(trace, "abcd");
    CHECK_INT(virtual_ns, (1000000u + 40) * (uint64_t)MS);
    end();
}

static void a_delay_that_is_over_already_never_runs_inside_the_call(void) {
    begin();
    tcpsrv_call_later(loop, 0, note, letter("a"));
    tcpsrv_call_later(loop, -5, note, letter("b"));
    tcpsrv_call_later(loop, INT64_MIN, note, letter("c"));
    CHECK_STR(trace, "");
    CHECK_INT(tcpsrv_loop_poll(loop, 100), 0);
    CHECK_STR(trace, "abc");
    end();
}

static void a_delay_is_never_cut_short(void) {
    uint64_t start;
    int i;
    begin();
    for (i = 1; i <= 20; i += 6) {
        start = test_ns();
        tcpsrv_call_later(loop, i, stop, NULL);
        CHECK_INT(tcpsrv_loop_run(loop), 0);
        CHECK(test_ns() - start >= (uint64_t)i * MS);
    }
    end();
}

static void take_10_ms_and_call_later(void *arg) {
    virtual_ns += 10 * MS;
    tcpsrv_call_later(loop, 20, count_up, arg);
}

static void a_delay_counts_from_its_call_also_late_in_a_long_turn(void) {
    int count = 0;
    begin_virtual();
    tcpsrv_call_soon(loop, take_10_ms_and_call_later, &count);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    virtual_ns += 19 * MS;
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 0);
    virtual_ns += 1 * MS;
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 1);
    end();
}

static void the_furthest_deadline_does_not_wrap(void) {
    int count = 0;
    begin_virtual();
    CHECK(tcpsrv_call_later(loop, INT64_MAX, count_up, &count) > 0);
    CHECK(tcpsrv_call_later(loop, INT64_MAX / 1000000, count_up, &count) > 0);
    CHECK(tcpsrv_call_every(loop, INT64_MAX, count_up, &count) > 0);
    CHECK(tcpsrv_loop_timeout(loop) > 1000000);
    CHECK_INT(tcpsrv_loop_poll(loop, 10), 0);
    CHECK_INT(count, 0);
    end();
}

static void note_and_again(void *arg) {
    note(letter("a"));
    tcpsrv_call_soon(loop, note, arg);
    tcpsrv_call_later(loop, 0, note, arg);
    tcpsrv_call_later(loop, -1, note, arg);
}

static void a_timer_made_by_a_timer_waits_for_the_next_turn(void) {
    begin_virtual();
    tcpsrv_call_soon(loop, note_and_again, letter("c"));
    tcpsrv_call_soon(loop, note, letter("b"));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "ab");
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abccc");
    end();
}

/* A callback that takes time makes a timer that is due already when the turn goes on. */
static void take_time_and_again(void *arg) {
    tcpsrv_call_later(loop, 1, note, arg);
    virtual_ns += 10 * MS;
    note(letter("a"));
}

static void a_late_turn_runs_timers_in_the_order_of_their_deadlines(void) {
    begin_virtual();
    tcpsrv_call_soon(loop, take_time_and_again, letter("b"));
    tcpsrv_call_later(loop, 2, note, letter("c"));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abc");
    end();
}

static void soon_for_ever(void *arg) {
    ++*(int *)arg;
    tcpsrv_call_soon(loop, soon_for_ever, arg);
}

static void on_readable_stop(int fd, int events, void *arg) {
    (void)fd, (void)events, (void)arg;
    tcpsrv_loop_stop(loop);
}

static void calls_that_beget_calls_do_not_starve_descriptors(void) {
    int fds[2], count = 0;
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_readable_stop, NULL) > 0);
    tcpsrv_call_soon(loop, soon_for_ever, &count);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void a_cancelled_timer_does_not_run(void) {
    int64_t id;
    int count = 0;
    begin_virtual();
    id = tcpsrv_call_later(loop, 10, count_up, &count);
    CHECK(id > 0);
    tcpsrv_cancel(loop, id);
    tcpsrv_cancel(loop, id);
    id = tcpsrv_call_soon(loop, count_up, &count);
    tcpsrv_cancel(loop, id);
    CHECK_INT(tcpsrv_loop_poll(loop, 20), 0);
    CHECK_INT(count, 0);
    end();
}

static int64_t victim;

static void note_and_cancel(void *arg) {
    note(arg);
    tcpsrv_cancel(loop, victim);
}

static void a_timer_cancelled_by_another_of_the_same_turn_does_not_run(void) {
    begin_virtual();
    tcpsrv_call_later(loop, 5, note_and_cancel, letter("a"));
    victim = tcpsrv_call_later(loop, 5, note, letter("b"));
    tcpsrv_call_later(loop, 5, note, letter("c"));
    CHECK_INT(tcpsrv_loop_poll(loop, -1), 0);
    CHECK_STR(trace, "ac");
    end();
}

static void a_dead_id_does_nothing_and_never_meets_a_new_timer(void) {
    int64_t old[200], id;
    int i, count = 0;
    begin();
    for (i = 0; i < 200; i++) {
        old[i] = tcpsrv_call_soon(loop, count_up, &count);
        CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    }
    CHECK_INT(count, 200);
    id = tcpsrv_call_soon(loop, count_up, &count);
    for (i = 0; i < 200; i++) {
        CHECK(old[i] != id && old[i] > 0);
        tcpsrv_cancel(loop, old[i]);
    }
    tcpsrv_cancel(loop, 0);
    tcpsrv_cancel(loop, -1);
    tcpsrv_cancel(loop, INT64_MAX);
    tcpsrv_cancel(loop, INT64_MIN);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(count, 201);
    end();
}

static void many_timers_that_come_and_go_need_no_more_memory(void) {
    int64_t ids[2000], bytes = 0;
    int i, round, count = 0;
    begin();
    for (round = 0; round < 50; round++) {
        for (i = 0; i < 2000; i++)
            ids[i] = tcpsrv_call_later(loop, 3600000, count_up, &count);
        for (i = 0; i < 2000; i++) tcpsrv_cancel(loop, ids[(i * 7) % 2000]);
        CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
        if (round == 0) bytes = test_live_bytes;
        CHECK_INT(test_live_bytes, bytes);
    }
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    CHECK_INT(count, 0);
    end();
}

enum { MANY = 100000 };
static uint64_t last_seen;
static int seen;

static void check_order(void *arg) {
    uint64_t due = (uint64_t)(uintptr_t)arg;
    CHECK(due >= last_seen);
    CHECK(due % 3 != 0);
    last_seen = due;
    seen++;
}

static void a_hundred_thousand_timers_run_in_order(void) {
    int64_t *ids = (int64_t *)malloc(MANY * sizeof *ids);
    uint32_t random = 1;
    int i, expected = 0;
    CHECK(ids != NULL);
    begin_virtual();
    for (i = 0; i < MANY; i++) {
        uint32_t delay;
        random = random * 1664525u + 1013904223u;
        delay = 1 + (random >> 8) % 100000u;
        ids[i] = tcpsrv_call_later(loop, delay, check_order, (void *)(uintptr_t)delay);
        CHECK(ids[i] > 0);
        if (delay % 3 != 0) {
            expected++;
            ids[i] = 0;
        }
    }
    for (i = 0; i < MANY; i++) tcpsrv_cancel(loop, ids[i]);
    tcpsrv_call_later(loop, 100001, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(seen, expected);
    end();
    free(ids);
}

/* A periodic call notes when it runs, in seconds, and takes as long as it is told. */
static int starts[16], durations[16], ticks, ticks_wanted;

static void on_tick(void *arg) {
    (void)arg;
    starts[ticks] = (int)(virtual_ns / (1000u * (uint64_t)MS));
    virtual_ns += (uint64_t)durations[ticks] * 1000u * MS;
    if (++ticks == ticks_wanted) tcpsrv_loop_stop(loop);
}

static void check_ticks(const int *taken, const int *expected, int count) {
    int i;
    begin_virtual();
    ticks_wanted = count;
    for (i = 0; i < count; i++) durations[i] = taken ? taken[i] : 0;
    CHECK(tcpsrv_call_every(loop, 10000, on_tick, NULL) > 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    for (i = 0; i < count; i++) CHECK_INT(starts[i], expected[i]);
    end();
}

static void a_periodic_call_begins_after_one_period_and_keeps_to_its_grid(void) {
    static const int expected[] = { 1010, 1020, 1030, 1040, 1050 };
    check_ticks(NULL, expected, TEST_COUNT(expected));
}

static void a_periodic_call_that_overruns_skips_what_it_missed(void) {
    static const int taken[] = { 9, 9, 10, 11, 20, 20, 35, 35, 0, 0, 0 };
    static const int expected[] = { 1010, 1020, 1030, 1050, 1070, 1100, 1130, 1170, 1210, 1220,
                                    1230 };
    check_ticks(taken, expected, TEST_COUNT(expected));
}

static void take_25_seconds(void *arg) {
    (void)arg;
    virtual_ns += 25000u * (uint64_t)MS;
}

static void a_periodic_call_held_up_by_others_runs_once_and_returns_to_its_grid(void) {
    begin_virtual();
    ticks_wanted = 3;
    tcpsrv_call_later(loop, 9000, take_25_seconds, NULL);
    CHECK(tcpsrv_call_every(loop, 10000, on_tick, NULL) > 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(starts[0], 1034);
    CHECK_INT(starts[1], 1040);
    CHECK_INT(starts[2], 1050);
    end();
}

static int64_t periodic;

static void tick_three_times(void *arg) {
    if (++*(int *)arg == 3) tcpsrv_cancel(loop, periodic);
}

static void a_periodic_call_may_cancel_itself(void) {
    int count = 0;
    begin_virtual();
    periodic = tcpsrv_call_every(loop, 10, tick_three_times, &count);
    tcpsrv_call_later(loop, 100, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(count, 3);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    end();
}

static void restart_periodic(void *arg) {
    ++*(int *)arg;
    tcpsrv_cancel(loop, periodic);
    periodic = tcpsrv_call_every(loop, 10, restart_periodic, arg);
}

static void a_periodic_call_restarted_by_itself_is_not_doubled(void) {
    int count = 0;
    begin_virtual();
    periodic = tcpsrv_call_every(loop, 10, restart_periodic, &count);
    tcpsrv_call_later(loop, 55, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(count, 5);
    end();
}

static void a_period_must_be_positive(void) {
    begin();
    CHECK_INT(tcpsrv_call_every(loop, 0, stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_call_every(loop, -10, stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_loop_timeout(loop), -1);
    end();
}

/* ---- posted calls ---------------------------------------------------------------------------- */

static void posted_calls_run_in_order_and_never_inside_post(void) {
    begin();
    CHECK_INT(tcpsrv_post(loop, note, letter("a")), 0);
    CHECK_INT(tcpsrv_post(loop, note, letter("b")), 0);
    CHECK_INT(tcpsrv_post(loop, note, letter("c")), 0);
    CHECK_STR(trace, "");
    CHECK_INT(tcpsrv_loop_poll(loop, -1), 0);
    CHECK_STR(trace, "abc");
    end();
}

static void *post_stop_later(void *arg) {
    test_sleep_ms(50);
    tcpsrv_post(loop, stop, arg);
    return NULL;
}

static void a_post_wakes_a_sleeping_loop(void) {
    pthread_t thread;
    begin();
    tcpsrv_call_later(loop, 20000, note, letter("x"));
    CHECK_INT(pthread_create(&thread, NULL, post_stop_later, NULL), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_STR(trace, "");
    CHECK_INT(pthread_join(thread, NULL), 0);
    end();
}

static void post_stop(void *arg) {
    (void)arg;
    CHECK_INT(tcpsrv_post(loop, stop, NULL), 0);
}

static void a_post_from_a_timer_does_not_wait_for_the_next_one(void) {
    begin();
    tcpsrv_call_later(loop, 20000, note, letter("x"));
    tcpsrv_call_later(loop, 1, post_stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_STR(trace, "");
    end();
}

static void post_again(void *arg) {
    if (++*(int *)arg == 1000) tcpsrv_loop_stop(loop);
    else CHECK_INT(tcpsrv_post(loop, post_again, arg), 0);
}

static void posted_calls_may_post(void) {
    int count = 0;
    begin();
    CHECK_INT(tcpsrv_post(loop, post_again, &count), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(count, 1000);
    end();
}

enum { POSTERS = 4, POSTS = 5000 };
typedef struct poster {
    pthread_t thread;
    int next, sent;
} poster;
static int posts_left = POSTERS * POSTS;

/* Each call carries its poster and finds by itself whether it comes in turn. */
typedef struct numbered {
    poster *from;
    int number;
} numbered;

static void on_numbered(void *arg) {
    numbered *call = (numbered *)arg;
    CHECK_INT(call->number, call->from->next++);
    free(call);
    if (--posts_left == 0) tcpsrv_loop_stop(loop);
}

static void *post_many(void *arg) {
    poster *self = (poster *)arg;
    for (; self->sent < POSTS; self->sent++) {
        numbered *call = (numbered *)malloc(sizeof *call);
        if (!call) return NULL;
        call->from = self;
        call->number = self->sent;
        if (tcpsrv_post(loop, on_numbered, call) != 0) return NULL;
    }
    return arg;
}

static void posts_from_four_threads_all_arrive_in_each_threads_order(void) {
    static poster posters[POSTERS];
    int i;
    begin();
    for (i = 0; i < POSTERS; i++)
        CHECK_INT(pthread_create(&posters[i].thread, NULL, post_many, &posters[i]), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    for (i = 0; i < POSTERS; i++) {
        CHECK_INT(pthread_join(posters[i].thread, NULL), 0);
        CHECK_INT(posters[i].next, POSTS);
    }
    end();
}

static void *work_and_answer(void *arg) {
    *(int *)arg = 42;
    tcpsrv_post(loop, stop, NULL);
    return NULL;
}

static void a_threads_result_is_delivered_on_the_loop(void) {
    pthread_t thread;
    int result = 0;
    begin();
    CHECK_INT(pthread_create(&thread, NULL, work_and_answer, &result), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(result, 42);
    CHECK_INT(pthread_join(thread, NULL), 0);
    end();
}

static void calls_still_posted_when_the_loop_is_freed_are_dropped(void) {
    int i, count = 0;
    begin();
    for (i = 0; i < 1000; i++) CHECK_INT(tcpsrv_post(loop, count_up, &count), 0);
    end();
    CHECK_INT(count, 0);
}

/* ---- signals --------------------------------------------------------------------------------- */

static void on_signal_note(int signo, void *arg) {
    CHECK_INT(signo, SIGUSR1);
    note(arg);
}

static void a_signal_is_told_on_the_loop_and_not_before(void) {
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("s")) > 0);
    CHECK_INT(raise(SIGUSR1), 0);
    CHECK_STR(trace, "");
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "s");
    CHECK_INT(raise(SIGUSR1), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "ss");
    end();
}

static void deliveries_before_a_turn_merge(void) {
    size_t calls;
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("s")) > 0);
    raise(SIGUSR1);
    raise(SIGUSR1);
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    calls = strlen(trace);
    CHECK(calls >= 1 && calls <= 3);
    end();
}

static void *kill_later(void *arg) {
    test_sleep_ms(30);
    kill(getpid(), SIGUSR1);
    return arg;
}

static void on_signal_stop(int signo, void *arg) {
    (void)signo, (void)arg;
    tcpsrv_loop_stop(loop);
}

static void a_signal_on_another_thread_wakes_a_sleeping_loop(void) {
    pthread_t thread;
    sigset_t usr1;
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_stop, NULL) > 0);
    CHECK_INT(pthread_create(&thread, NULL, kill_later, NULL), 0);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    CHECK_INT(pthread_sigmask(SIG_BLOCK, &usr1, NULL), 0);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK_INT(pthread_join(thread, NULL), 0);
    end();
}

static int foreign_handled;

static void foreign_handler(int signo) {
    (void)signo;
    foreign_handled++;
}

static void install_foreign_handler(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = foreign_handler;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    CHECK_INT(sigaction(SIGUSR1, &action, NULL), 0);
}

static void *disposition(int signo) {
    struct sigaction action;
    void *handler;
    CHECK_INT(sigaction(signo, NULL, &action), 0);
    memcpy(&handler, &action.sa_handler, sizeof handler);
    return handler;
}

static void the_disposition_is_restored_when_the_last_call_is_cancelled(void) {
    int64_t first, second;
    void *before;
    install_foreign_handler();
    before = disposition(SIGUSR1);
    begin();
    first = tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("a"));
    second = tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("b"));
    CHECK(first > 0 && second > 0 && first != second);
    CHECK(disposition(SIGUSR1) != before);
    tcpsrv_cancel(loop, first);
    CHECK(disposition(SIGUSR1) != before);
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "b");
    tcpsrv_cancel(loop, second);
    CHECK(disposition(SIGUSR1) == before);
    raise(SIGUSR1);
    CHECK_INT(foreign_handled, 1);
    end();
}

static void the_disposition_is_restored_when_the_loop_is_freed(void) {
    void *before = disposition(SIGUSR2);
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGUSR2, on_signal_stop, NULL) > 0);
    CHECK(disposition(SIGUSR2) != before);
    end();
    CHECK(disposition(SIGUSR2) == before);
}

static void all_calls_of_a_signal_run(void) {
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("x")) > 0);
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("x")) > 0);
    CHECK(tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("x")) > 0);
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "xxx");
    end();
}

static int64_t signal_ids[2];

static void on_signal_cancel_both(int signo, void *arg) {
    on_signal_note(signo, arg);
    tcpsrv_cancel(loop, signal_ids[0]);
    tcpsrv_cancel(loop, signal_ids[1]);
}

static void a_signals_call_may_cancel_itself_and_another(void) {
    void *before = disposition(SIGUSR1);
    begin();
    signal_ids[0] = tcpsrv_on_signal(loop, SIGUSR1, on_signal_cancel_both, letter("x"));
    signal_ids[1] = tcpsrv_on_signal(loop, SIGUSR1, on_signal_cancel_both, letter("x"));
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "x");
    CHECK(disposition(SIGUSR1) == before);
    end();
}

static void signals_that_cannot_be_caught_are_refused(void) {
    begin();
    CHECK_INT(tcpsrv_on_signal(loop, SIGKILL, on_signal_stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_on_signal(loop, SIGSTOP, on_signal_stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_on_signal(loop, 0, on_signal_stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_on_signal(loop, -1, on_signal_stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_on_signal(loop, 100000, on_signal_stop, NULL), -EINVAL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
}

static void a_signal_belongs_to_one_loop(void) {
    tcpsrv_loop *other = tcpsrv_loop_new();
    int64_t id;
    begin();
    id = tcpsrv_on_signal(loop, SIGUSR1, on_signal_note, letter("a"));
    CHECK(id > 0);
    CHECK_INT(tcpsrv_on_signal(other, SIGUSR1, on_signal_note, letter("b")), TCPSRV_EBUSY);
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(other, 0), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "a");
    tcpsrv_cancel(loop, id);
    CHECK(tcpsrv_on_signal(other, SIGUSR1, on_signal_note, letter("b")) > 0);
    raise(SIGUSR1);
    CHECK_INT(tcpsrv_loop_poll(other, 1000), 0);
    CHECK_STR(trace, "ab");
    CHECK_INT(tcpsrv_loop_free(other), 0);
    end();
}

static void a_foreign_signal_does_not_end_poll_or_run_with_an_error(void) {
    pthread_t thread;
    int i;
    install_foreign_handler();
    begin();
    for (i = 0; i < 3; i++) {
        CHECK_INT(pthread_create(&thread, NULL, kill_later, NULL), 0);
        tcpsrv_call_later(loop, 60, stop, NULL);
        CHECK_INT(tcpsrv_loop_run(loop), 0);
        CHECK_INT(pthread_join(thread, NULL), 0);
    }
    end();
}

/* ---- watches --------------------------------------------------------------------------------- */

static int told, told_count, told_fd;

static void on_told(int fd, int events, void *arg) {
    told_fd = fd;
    told |= events;
    told_count++;
    if (arg) note(arg);
}

static void read_is_told_alone_when_only_read_was_asked(void) {
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_told, letter("x")) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 20), 0);
    CHECK_INT(told_count, 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(told, TCPSRV_READ);
    CHECK_INT(told_count, 1);
    CHECK_INT(told_fd, fds[0]);
    CHECK_STR(trace, "x");
    end();
    close(fds[0]);
    close(fds[1]);
}

static void write_is_told_alone_when_only_write_was_asked(void) {
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, on_told, NULL) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(told, TCPSRV_WRITE);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void both_directions_of_a_descriptor_are_told(void) {
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ | TCPSRV_WRITE, on_told, NULL) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(told, TCPSRV_READ | TCPSRV_WRITE);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void a_watch_is_told_again_until_the_descriptor_is_dry(void) {
    int fds[2], i;
    char byte;
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_told, NULL) > 0);
    for (i = 1; i <= 3; i++) {
        CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
        CHECK_INT(told_count, i);
    }
    CHECK_INT(read(fds[0], &byte, 1), 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 10), 0);
    CHECK_INT(told_count, 3);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void a_hang_up_is_told_besides(void) {
    int fds[2];
    begin();
    CHECK_INT(pipe(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_told, NULL) > 0);
    close(fds[1]);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK(told & TCPSRV_HANGUP);
    CHECK_INT(told & ~TCPSRV_HANGUP & ~TCPSRV_READ, 0);
    end();
    close(fds[0]);
}

static void an_error_on_the_other_side_of_a_pipe_is_told_as_hang_up(void) {
    int fds[2];
    begin();
    CHECK_INT(pipe(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[1], TCPSRV_WRITE, on_told, NULL) > 0);
    close(fds[0]);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK(told & TCPSRV_HANGUP);
    CHECK_INT(told & TCPSRV_READ, 0);
    end();
    close(fds[1]);
}

static void a_descriptor_is_watched_once(void) {
    int64_t id;
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    id = tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_told, letter("a"));
    CHECK(id > 0);
    CHECK_INT(tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, on_told, letter("b")), -EEXIST);
    CHECK(tcpsrv_last_error()[0] != 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "a");
    tcpsrv_cancel(loop, id);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, on_told, letter("b")) > 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "ab");
    end();
    close(fds[0]);
    close(fds[1]);
}

static void what_cannot_be_watched_is_refused(void) {
    FILE *file = tmpfile();
    begin();
    CHECK(file != NULL);
    CHECK_INT(tcpsrv_watch_fd(loop, fileno(file), TCPSRV_READ, on_told, NULL), -EPERM);
    CHECK_INT(tcpsrv_watch_fd(loop, -1, TCPSRV_READ, on_told, NULL), -EBADF);
    CHECK_INT(tcpsrv_watch_fd(loop, 15000, TCPSRV_READ, on_told, NULL), -EBADF);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(told_count, 0);
    end();
    fclose(file);
}

static int64_t watch_ids[2];

static void on_told_cancel_both(int fd, int events, void *arg) {
    on_told(fd, events, arg);
    tcpsrv_cancel(loop, watch_ids[0]);
    tcpsrv_cancel(loop, watch_ids[1]);
}

static void a_watch_cancelled_by_another_of_the_same_batch_is_not_told(void) {
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    watch_ids[0] = tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, on_told_cancel_both, NULL);
    watch_ids[1] = tcpsrv_watch_fd(loop, fds[1], TCPSRV_WRITE, on_told_cancel_both, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(told_count, 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 10), 0);
    CHECK_INT(told_count, 1);
    end();
    close(fds[0]);
    close(fds[1]);
}

/* Two ready pipes; whichever is told first replaces the other's descriptor by a pipe that has
   nothing to read, under the same number. */
static int twins[2][2], fresh[2];

static void on_told_replace_other(int fd, int events, void *arg) {
    int other = fd == twins[0][0] ? 1 : 0, number = twins[other][0];
    (void)arg;
    on_told(fd, events, NULL);
    tcpsrv_cancel(loop, watch_ids[1 - other]);
    tcpsrv_cancel(loop, watch_ids[other]);
    close(number);
    CHECK_INT(pipe(fresh), 0);
    if (fresh[0] != number) {
        CHECK_INT(dup2(fresh[0], number), number);
        close(fresh[0]);
        fresh[0] = number;
    }
    CHECK(tcpsrv_watch_fd(loop, number, TCPSRV_READ, on_told, letter("n")) > 0);
}

static void a_reused_descriptor_number_does_not_get_its_forerunners_event(void) {
    int i;
    begin();
    for (i = 0; i < 2; i++) {
        CHECK_INT(pipe(twins[i]), 0);
        CHECK_INT(write(twins[i][1], "x", 1), 1);
        watch_ids[i] = tcpsrv_watch_fd(loop, twins[i][0], TCPSRV_READ, on_told_replace_other, NULL);
        CHECK(watch_ids[i] > 0);
    }
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_INT(told_count, 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 10), 0);
    CHECK_STR(trace, "");
    CHECK_INT(write(fresh[1], "x", 1), 1);
    CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
    CHECK_STR(trace, "n");
    end();
    for (i = 0; i < 2; i++) {
        close(twins[i][0]);
        close(twins[i][1]);
    }
    close(fresh[1]);
}

static void on_told_watch_again(int fd, int events, void *arg) {
    on_told(fd, events, arg);
    tcpsrv_cancel(loop, watch_ids[0]);
    watch_ids[0] = tcpsrv_watch_fd(loop, fd, TCPSRV_READ, on_told_watch_again, arg);
    CHECK(watch_ids[0] > 0);
}

static void a_watch_may_replace_itself(void) {
    int fds[2], i;
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    watch_ids[0] = tcpsrv_watch_fd(loop, fds[0], TCPSRV_READ, on_told_watch_again, NULL);
    for (i = 1; i <= 5; i++) {
        CHECK_INT(tcpsrv_loop_poll(loop, 1000), 0);
        CHECK_INT(told_count, i);
    }
    end();
    close(fds[0]);
    close(fds[1]);
}

static void a_busy_descriptor_does_not_starve_timers(void) {
    int fds[2];
    begin();
    CHECK_INT(test_pair(fds), 0);
    CHECK(tcpsrv_watch_fd(loop, fds[0], TCPSRV_WRITE, on_told, NULL) > 0);
    tcpsrv_call_later(loop, 5, stop, NULL);
    CHECK_INT(tcpsrv_loop_run(loop), 0);
    CHECK(told_count > 0);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void on_told_mark(int fd, int events, void *arg) {
    (void)fd, (void)events;
    *(int *)arg = 1;
}

static void more_watches_than_a_batch_holds_are_all_told(void) {
    enum { WATCHES = 700 };
    static int fds[WATCHES], marks[WATCHES];
    int i, marked = 0;
    begin();
    for (i = 0; i < WATCHES; i += 2) CHECK_INT(test_pair(&fds[i]), 0);
    for (i = 0; i < WATCHES; i++)
        CHECK(tcpsrv_watch_fd(loop, fds[i], TCPSRV_WRITE, on_told_mark, &marks[i]) > 0);
    for (i = 0; i < 3; i++) CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    for (i = 0; i < WATCHES; i++) marked += marks[i];
    CHECK_INT(marked, WATCHES);
    end();
    for (i = 0; i < WATCHES; i++) close(fds[i]);
}

/* ---- out of memory --------------------------------------------------------------------------- */

/* Lets the first, second, ... allocation of one call fail until it comes through: every refusal is
   -ENOMEM, and the harness finds what a failing path forgot. */
static void sweep(int64_t (*attempt)(void)) {
    int64_t n = 0, result;
    do {
        test_fail_alloc_at = ++n;
        result = attempt();
        if (test_fail_alloc_at == 0) CHECK_INT(result, -ENOMEM);
        if (result < 0) CHECK(strstr(tcpsrv_last_error(), strerror(ENOMEM)) != NULL);
    } while (result < 0);
    CHECK(n > 1);
    test_fail_alloc_at = 0;
}

static int64_t attempt_loop(void) {
    tcpsrv_loop *attempted = tcpsrv_loop_new();
    if (!attempted) return -ENOMEM;
    return tcpsrv_loop_free(attempted);
}

/* So many that the loop's tables must grow on the way. */
static int64_t attempt_timers(void) {
    int64_t id = 1;
    int i;
    for (i = 0; i < 150 && id > 0; i++) id = tcpsrv_call_later(loop, 1000, stop, NULL);
    return id;
}

static int64_t attempt_post(void) {
    return tcpsrv_post(loop, stop, NULL);
}

static int64_t attempt_signal(void) {
    return tcpsrv_on_signal(loop, SIGUSR1, on_signal_stop, NULL);
}

static int watched_fd;

static int64_t attempt_watch(void) {
    return tcpsrv_watch_fd(loop, watched_fd, TCPSRV_READ, on_told, NULL);
}

static void out_of_memory_is_a_code_and_leaks_nothing(void) {
    int fds[2];
    CHECK_INT(pipe(fds), 0);
    watched_fd = fds[0];
    sweep(attempt_loop);
    begin();
    sweep(attempt_timers);
    sweep(attempt_post);
    sweep(attempt_signal);
    sweep(attempt_watch);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
    close(fds[0]);
    close(fds[1]);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(the_default_loop_is_the_same_at_each_call),
        TEST(a_freed_default_loop_is_made_anew),
        TEST(further_loops_stand_beside_the_default_one),
        TEST(run_returns_0_after_stop_and_runs_again),
        TEST(stop_lets_the_turn_end),
        TEST(stop_before_run_makes_it_return_at_once),
        TEST(run_poll_and_free_are_refused_in_callbacks),
        TEST(a_forked_child_may_not_turn_its_parents_loop),
        TEST(poll_asks_nobody_whose_process_it_is),
        TEST(poll_with_0_does_what_is_ready_and_never_waits),
        TEST(poll_waits_as_long_as_it_may_and_no_longer_than_the_next_timer),
        TEST(timeout_tells_the_milliseconds_to_the_next_deadline),
        TEST(now_is_read_once_a_turn),
        TEST(an_idle_loop_sleeps),
#if defined(TCPSERVER_USE_POLL)
        TEST(poll_has_no_descriptor_for_a_foreign_loop),
#else
        TEST(a_loop_lives_inside_a_foreign_one),
#endif
        TEST(loops_in_two_threads_share_nothing),
        TEST(free_drops_what_hangs_on_the_loop),
        TEST(strerror_names_every_code),
        TEST(last_error_is_a_sentence_of_the_threads_own),
        TEST(soon_runs_on_the_next_turn_in_the_order_of_the_calls),
        TEST(equal_deadlines_run_in_the_order_of_the_calls),
        TEST(timers_run_in_the_order_of_their_deadlines),
        TEST(a_delay_that_is_over_already_never_runs_inside_the_call),
        TEST(a_delay_is_never_cut_short),
        TEST(a_delay_counts_from_its_call_also_late_in_a_long_turn),
        TEST(the_furthest_deadline_does_not_wrap),
        TEST(a_timer_made_by_a_timer_waits_for_the_next_turn),
        TEST(a_late_turn_runs_timers_in_the_order_of_their_deadlines),
        TEST(calls_that_beget_calls_do_not_starve_descriptors),
        TEST(a_cancelled_timer_does_not_run),
        TEST(a_timer_cancelled_by_another_of_the_same_turn_does_not_run),
        TEST(a_dead_id_does_nothing_and_never_meets_a_new_timer),
        TEST(many_timers_that_come_and_go_need_no_more_memory),
        TEST(a_hundred_thousand_timers_run_in_order),
        TEST(a_periodic_call_begins_after_one_period_and_keeps_to_its_grid),
        TEST(a_periodic_call_that_overruns_skips_what_it_missed),
        TEST(a_periodic_call_held_up_by_others_runs_once_and_returns_to_its_grid),
        TEST(a_periodic_call_may_cancel_itself),
        TEST(a_periodic_call_restarted_by_itself_is_not_doubled),
        TEST(a_period_must_be_positive),
        TEST(posted_calls_run_in_order_and_never_inside_post),
        TEST(a_post_wakes_a_sleeping_loop),
        TEST(a_post_from_a_timer_does_not_wait_for_the_next_one),
        TEST(posted_calls_may_post),
        TEST(posts_from_four_threads_all_arrive_in_each_threads_order),
        TEST(a_threads_result_is_delivered_on_the_loop),
        TEST(calls_still_posted_when_the_loop_is_freed_are_dropped),
        TEST(a_signal_is_told_on_the_loop_and_not_before),
        TEST(deliveries_before_a_turn_merge),
        TEST(a_signal_on_another_thread_wakes_a_sleeping_loop),
        TEST(the_disposition_is_restored_when_the_last_call_is_cancelled),
        TEST(the_disposition_is_restored_when_the_loop_is_freed),
        TEST(all_calls_of_a_signal_run),
        TEST(a_signals_call_may_cancel_itself_and_another),
        TEST(signals_that_cannot_be_caught_are_refused),
        TEST(a_signal_belongs_to_one_loop),
        TEST(a_foreign_signal_does_not_end_poll_or_run_with_an_error),
        TEST(read_is_told_alone_when_only_read_was_asked),
        TEST(write_is_told_alone_when_only_write_was_asked),
        TEST(both_directions_of_a_descriptor_are_told),
        TEST(a_watch_is_told_again_until_the_descriptor_is_dry),
        TEST(a_hang_up_is_told_besides),
        TEST(an_error_on_the_other_side_of_a_pipe_is_told_as_hang_up),
        TEST(a_descriptor_is_watched_once),
        TEST(what_cannot_be_watched_is_refused),
        TEST(a_watch_cancelled_by_another_of_the_same_batch_is_not_told),
        TEST(a_reused_descriptor_number_does_not_get_its_forerunners_event),
        TEST(a_watch_may_replace_itself),
        TEST(a_busy_descriptor_does_not_starve_timers),
        TEST(more_watches_than_a_batch_holds_are_all_told),
        TEST(out_of_memory_is_a_code_and_leaks_nothing),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
