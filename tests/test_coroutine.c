/* Coroutines: spawn, join, yield, sleep, park and wake, and how they end with their loop. */
#include "test.h"
#include <sys/time.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

#define MS 1000000u

static tcpsrv_loop *loop;
static char trace[256];

static void begin(void) {
    loop = tcpsrv_loop_default();
    CHECK(loop != NULL);
}

static void end(void) {
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

/* The argument of a function that only notes it is a text that nobody writes to. */
static void *letter(const char *text) {
    return (void *)(uintptr_t)text;
}

static void note(void *text) {
    size_t n = strlen(trace);
    if (n + 1 < sizeof trace) trace[n] = *(const char *)text;
}

static void count_up(void *counter) {
    ++*(int *)counter;
}

static void stop(void *arg) {
    (void)arg;
    tcpsrv_loop_stop(loop);
}

/* valgrind and emulators ask for smaller numbers, by the harness's knob for a longer watchdog. */
static int is_slow(void) {
    return SANITIZED || getenv("TEST_SLOW") != NULL;
}

static int64_t spawn(int (*fn)(void *arg), void *arg) {
    int64_t id = tcpsrv_spawn(loop, fn, arg, 0);
    CHECK(id > 0);
    return id;
}

static int give(void *number) {
    return (int)(intptr_t)number;
}

static void *number(int n) {
    return (void *)(intptr_t)n;
}

static int note_it(void *text) {
    note(text);
    return 0;
}

/* ---- spawn and join -------------------------------------------------------------------------- */

static void a_coroutine_runs_from_the_next_turn_on_in_the_order_of_the_calls(void) {
    begin();
    spawn(note_it, letter("a"));
    spawn(note_it, letter("b"));
    spawn(note_it, letter("c"));
    CHECK_STR(trace, "");
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abc");
    end();
}

static int spawn_another(void *arg) {
    note(letter("a"));
    spawn(note_it, arg);
    note(letter("b"));
    return 0;
}

static void a_coroutine_spawned_by_one_does_not_run_inside_it(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(spawn_another, letter("c"))), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "abc");
    end();
}

static void join_gives_the_result_once(void) {
    int64_t id;
    begin();
    id = spawn(give, number(42));
    CHECK_INT(tcpsrv_join(id), 42);
    CHECK_INT(tcpsrv_join(id), -ESRCH);
    CHECK(tcpsrv_last_error()[0] != 0);
    id = spawn(give, number(-5));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_join(id), -5);
    CHECK_INT(tcpsrv_join(id), -ESRCH);
    end();
}

static int join_lowest(void *unused) {
    (void)unused;
    return tcpsrv_join(spawn(give, number(INT_MIN)));
}

static void any_result_ends_a_join(void) {
    static const int results[] = { INT_MIN, INT_MAX, TCPSRV_ECANCELED };
    size_t i;
    begin();
    for (i = 0; i < sizeof results / sizeof results[0]; i++) {
        int64_t id = spawn(give, number(results[i]));
        CHECK_INT(tcpsrv_join(id), results[i]);
    }
    CHECK_INT(tcpsrv_join(spawn(join_lowest, NULL)), INT_MIN);
    end();
}

static void join_of_an_unknown_id_is_refused(void) {
    int64_t timer;
    begin();
    timer = tcpsrv_call_later(loop, 1000, stop, NULL);
    CHECK_INT(tcpsrv_join(0), -ESRCH);
    CHECK_INT(tcpsrv_join(-1), -ESRCH);
    CHECK_INT(tcpsrv_join(INT64_MAX), -ESRCH);
    CHECK_INT(tcpsrv_join(timer), -ESRCH);
    CHECK(tcpsrv_loop_timeout(loop) > 0);
    end();
}

static int sleep_and_give(void *n) {
    int err = tcpsrv_sleep(10);
    return err ? err : give(n);
}

static int join_it(void *id) {
    return tcpsrv_join(*(int64_t *)id);
}

static void join_waits_for_the_end(void) {
    int64_t sleeper;
    begin();
    sleeper = spawn(sleep_and_give, number(7));
    CHECK_INT(tcpsrv_join(spawn(join_it, &sleeper)), 7);
    CHECK_INT(tcpsrv_join(spawn(sleep_and_give, number(8))), 8);
    end();
}

static void a_second_joiner_is_refused(void) {
    int64_t sleeper, first, second;
    begin();
    sleeper = spawn(sleep_and_give, number(7));
    first = spawn(join_it, &sleeper);
    second = spawn(join_it, &sleeper);
    CHECK_INT(tcpsrv_join(second), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_join(first), 7);
    end();
}

static int join_myself(void *arg) {
    (void)arg;
    return tcpsrv_join(tcpsrv_self());
}

static void joining_oneself_is_refused(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(join_myself, NULL)), -EDEADLK);
    end();
}

static int tell_self(void *id) {
    *(int64_t *)id = tcpsrv_self();
    return tcpsrv_yield() == 0 && tcpsrv_self() == *(int64_t *)id ? 0 : 1;
}

static void check_no_self(void *arg) {
    CHECK_INT(tcpsrv_self(), 0);
    note(arg);
}

static void self_is_the_running_coroutine_and_0_outside(void) {
    int64_t id, told = 0;
    begin();
    CHECK_INT(tcpsrv_self(), 0);
    id = spawn(tell_self, &told);
    tcpsrv_call_soon(loop, check_no_self, letter("x"));
    CHECK_INT(tcpsrv_join(id), 0);
    CHECK_INT(told, id);
    CHECK_STR(trace, "x");
    CHECK_INT(tcpsrv_self(), 0);
    end();
}

static void results_are_kept_for_the_last_65536(void) {
    enum { KEPT = 65536, ALL = KEPT + 100 };
    int64_t *ids;
    int i;
    if (is_slow()) return; /* a number that cannot be scaled */
    ids = (int64_t *)malloc(ALL * sizeof *ids);
    CHECK(ids != NULL);
    begin();
    for (i = 0; i < ALL; i++) {
        ids[i] = spawn(give, number(i));
        if (i % 16 == 15) CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    }
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    for (i = 0; i < ALL; i++) CHECK_INT(tcpsrv_join(ids[i]), i < ALL - KEPT ? -ESRCH : i);
    end();
    free(ids);
}

/* Where the table of results cannot grow the oldest one goes, and the order stays when it grows
   after that. */
static void without_memory_for_results_the_oldest_is_forgotten(void) {
    enum { ALL = 70 };
    int64_t ids[ALL];
    size_t k;
    int i;
    begin();
    for (i = 0; i < ALL; i++) ids[i] = spawn(give, number(i));
    test_fail_alloc_at = 2;
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(test_fail_alloc_at, 0);
    CHECK_INT(loop->ended_count, ALL - 1);
    for (k = 0; k < loop->ended_count; k++)
        CHECK_INT(loop->ended[(loop->ended_first + k) % loop->ended_capacity], ids[k + 1]);
    CHECK_INT(tcpsrv_join(ids[0]), -ESRCH);
    for (i = 1; i < ALL; i++) CHECK_INT(tcpsrv_join(ids[i]), i);
    end();
}

static void dead_ids_never_meet_new_coroutines(void) {
    int64_t old[100], id;
    int i;
    begin();
    for (i = 0; i < 100; i++) {
        old[i] = spawn(give, number(i));
        CHECK_INT(tcpsrv_join(old[i]), i);
    }
    id = spawn(give, number(1000));
    for (i = 0; i < 100; i++) {
        CHECK(old[i] != id);
        CHECK_INT(tcpsrv_join(old[i]), -ESRCH);
    }
    CHECK_INT(tcpsrv_join(id), 1000);
    end();
}

/* ---- stacks ---------------------------------------------------------------------------------- */

/* Writes to so much of its stack, across a wait. */
static int use_stack(size_t size, unsigned char *memory) {
    size_t i;
    for (i = 0; i < size; i++) memory[i] = (unsigned char)(i * 31);
    if (tcpsrv_yield() != 0) return 1;
    for (i = 0; i < size; i++)
        if (memory[i] != (unsigned char)(i * 31)) return 1;
    return 0;
}

static int use_8_kib(void *arg) {
    unsigned char memory[8 * 1024];
    (void)arg;
    return use_stack(sizeof memory, memory);
}

static int use_48_kib(void *arg) {
    unsigned char memory[48 * 1024];
    (void)arg;
    return use_stack(sizeof memory, memory);
}

static int use_900_kib(void *arg) {
    unsigned char memory[900 * 1024];
    (void)arg;
    return use_stack(sizeof memory, memory);
}

static void stacks_have_at_least_the_size_asked_for(void) {
    int64_t ids[6];
    int i;
    begin();
    ids[0] = tcpsrv_spawn(loop, use_48_kib, NULL, 0);
    ids[1] = tcpsrv_spawn(loop, use_8_kib, NULL, 1);
    ids[2] = tcpsrv_spawn(loop, use_900_kib, NULL, 1 << 20);
    ids[3] = tcpsrv_spawn(loop, use_8_kib, NULL, 16385);
    ids[4] = tcpsrv_spawn(loop, use_48_kib, NULL, 65536);
    ids[5] = tcpsrv_spawn(loop, use_900_kib, NULL, (1 << 20) - 5);
    for (i = 0; i < 6; i++) CHECK(ids[i] > 0);
    for (i = 0; i < 6; i++) CHECK_INT(tcpsrv_join(ids[i]), 0);
    end();
}

/* What lies beside a handler, such as its stream, comes where the frames of another have been:
   valgrind must have been told. */
static void a_stack_is_taken_again_for_another_layout(void) {
    void *beside = NULL;
    tcpsrv__co *co;
    size_t i;
    begin();
    CHECK_INT(tcpsrv_join(spawn(use_48_kib, NULL)), 0);
    co = tcpsrv__co_new(loop, 0, 20000, &beside);
    CHECK(co != NULL);
    for (i = 0; i < 20000; i++) ((char *)beside)[i] = 1;
    for (i = 0; i < 20000; i++) CHECK(((char *)beside)[i] == 1);
    tcpsrv__co_unref(&co->source);
    end();
}

/* More values than there are registers of either kind, alive across a switch. */
static int compute(void *seed) {
    double x0 = give(seed), x1 = x0 + 1, x2 = x0 + 2, x3 = x0 + 3, x4 = x0 + 4, x5 = x0 + 5;
    double x6 = x0 + 6, x7 = x0 + 7, x8 = x0 + 8, x9 = x0 + 9, x10 = x0 + 10, x11 = x0 + 11;
    long a = give(seed), b = a + 1, c = a + 2, d = a + 3, e = a + 4, f = a + 5, g = a + 6;
    long h = a + 7, i = a + 8, j = a + 9, k = a + 10, l = a + 11, turn;
    for (turn = 0; turn < 50; turn++) {
        if (tcpsrv_yield() != 0) return -1;
        x0 += 1, x1 += 1, x2 += 1, x3 += 1, x4 += 1, x5 += 1, x6 += 1, x7 += 1, x8 += 1;
        x9 += 1, x10 += 1, x11 += 1;
        a++, b++, c++, d++, e++, f++, g++, h++, i++, j++, k++, l++;
    }
    if (a + b + c + d + e + f + g + h + i + j + k + l != 12 * (give(seed) + 50) + 66) return -2;
    return (int)(x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9 + x10 + x11);
}

static void registers_survive_the_switches(void) {
    int64_t ids[10];
    int i;
    begin();
    for (i = 0; i < 10; i++) ids[i] = spawn(compute, number(i * 1000));
    for (i = 0; i < 10; i++) CHECK_INT(tcpsrv_join(ids[i]), 12 * (i * 1000 + 50) + 66);
    end();
}

static int overflow(void *depth) {
    volatile char frame[1024];
    if (give(depth) == 1 << 20) return 0;
    frame[0] = frame[1023] = (char)overflow(number(give(depth) + 1));
    return frame[0] + frame[1023];
}

/* Emulators of a processor may take guards for a hint that they need not follow. */
static void a_stack_overflow_meets_the_guard(void) {
    int status = 0;
    pid_t pid;
    if (SANITIZED || getenv("TEST_EMULATED")) return;
    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
        begin();
        spawn(overflow, NULL);
        tcpsrv_loop_poll(loop, 0);
        _exit(1);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS);
}

static int park_and_count(void *counter) {
    int err = tcpsrv_park(-1);
    if (!err) count_up(counter);
    return err;
}

static void twenty_thousand_coroutines_park_and_wake(void) {
    int count = is_slow() ? 1000 : sizeof(void *) == 4 ? 5000 : 20000, i, woken = 0;
    int64_t *ids = (int64_t *)malloc((size_t)count * sizeof *ids);
    CHECK(ids != NULL);
    begin();
    for (i = 0; i < count; i++) ids[i] = spawn(park_and_count, &woken);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(woken, 0);
    for (i = 0; i < count; i++) tcpsrv_wake(loop, ids[count - 1 - i]);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(woken, count);
    for (i = 0; i < count; i++) CHECK_INT(tcpsrv_join(ids[i]), 0);
    end();
    free(ids);
}

/* What is kept of those that ended is bounded by the number of results that a loop keeps. */
static void coroutines_that_come_and_go_need_little_memory(void) {
    int i, round, rounds = is_slow() ? 5 : 1000;
    begin();
    for (round = 0; round < rounds; round++) {
        int64_t ids[200];
        for (i = 0; i < 200; i++) ids[i] = spawn(give, number(i));
        for (i = 0; i < 200; i++) CHECK_INT(tcpsrv_join(ids[i]), i);
    }
    CHECK(test_live_bytes < 4 << 20);
    end();
}

#if defined(__linux__)
static int mapping_count(void) {
    FILE *file = fopen("/proc/self/maps", "r");
    int c, lines = 0;
    CHECK(file != NULL);
    while ((c = getc(file)) != EOF) lines += c == '\n';
    fclose(file);
    return lines;
}

static void stacks_are_unmapped_with_their_loop(void) {
    int i, woken = 0, round, before = 0, after;
    if (SANITIZED || getenv("TEST_SLOW")) return; /* their own mappings come and go */
    for (round = 0; round < 3; round++) {
        if (round == 1) before = mapping_count();
        begin();
        for (i = 0; i < 1000; i++) spawn(park_and_count, &woken);
        CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
        end();
    }
    after = mapping_count();
    CHECK(after <= before + 3);
    CHECK_INT(woken, 0);
}
#endif

/* ---- yield and sleep ------------------------------------------------------------------------- */

static int note_three_times(void *text) {
    int i;
    for (i = 0; i < 3; i++) {
        note(text);
        if (tcpsrv_yield() != 0) return 1;
    }
    return 0;
}

static void yield_lets_each_of_the_others_run_once(void) {
    int64_t ids[3];
    int i;
    begin();
    ids[0] = spawn(note_three_times, letter("a"));
    ids[1] = spawn(note_three_times, letter("b"));
    ids[2] = spawn(note_three_times, letter("c"));
    for (i = 0; i < 3; i++) CHECK_INT(tcpsrv_join(ids[i]), 0);
    CHECK_STR(trace, "abcabcabc");
    end();
}

static int yield_until(void *flag) {
    int err = 0;
    while (!err && !*(volatile int *)flag) err = tcpsrv_yield();
    return err;
}

static void yielding_starves_neither_timers_nor_descriptors(void) {
    int timer_flag = 0, posted_flag = 0;
    begin();
    tcpsrv_call_later(loop, 5, count_up, &timer_flag);
    CHECK_INT(tcpsrv_join(spawn(yield_until, &timer_flag)), 0);
    CHECK_INT(tcpsrv_post(loop, count_up, &posted_flag), 0);
    CHECK_INT(tcpsrv_join(spawn(yield_until, &posted_flag)), 0);
    end();
}

typedef struct sleeper {
    int ms;
    const char *text;
} sleeper;

static int sleep_and_note(void *arg) {
    sleeper *self = (sleeper *)arg;
    int err = tcpsrv_sleep(self->ms);
    note(letter(self->text));
    return err;
}

static void sleepers_wake_in_the_order_of_their_deadlines(void) {
    static sleeper sleepers[] = { { 60, "d" }, { 1, "a" }, { 30, "b" }, { 30, "c" } };
    int64_t ids[4];
    int i;
    begin();
    for (i = 0; i < 4; i++) ids[i] = spawn(sleep_and_note, &sleepers[i]);
    for (i = 0; i < 4; i++) CHECK_INT(tcpsrv_join(ids[i]), 0);
    CHECK_STR(trace, "abcd");
    end();
}

static int sleep_20_ms(void *arg) {
    uint64_t start = test_ns();
    int err = tcpsrv_sleep(20);
    (void)arg;
    return err ? err : test_ns() - start >= 20 * MS ? 0 : 1;
}

static void sleep_is_never_cut_short(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(sleep_20_ms, NULL)), 0);
    CHECK_INT(sleep_20_ms(NULL), 0);
    end();
}

static void a_thousand_sleep_side_by_side(void) {
    int64_t ids[1000];
    uint64_t start = test_ns();
    int i;
    begin();
    for (i = 0; i < 1000; i++) ids[i] = spawn(sleep_and_give, number(i));
    for (i = 0; i < 1000; i++) CHECK_INT(tcpsrv_join(ids[i]), i);
    CHECK(test_ns() - start < 10000u * (uint64_t)MS);
    end();
}

static int sleep_0(void *arg) {
    (void)arg;
    return tcpsrv_sleep(0);
}

static void sleep_0_returns_and_lets_others_run(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(sleep_0, NULL)), 0);
    CHECK_INT(tcpsrv_sleep(0), 0);
    end();
}

/* ---- waiting outside coroutines -------------------------------------------------------------- */

static void a_waiting_call_outside_runs_the_loop(void) {
    int ran = 0, fds[2];
    begin();
    tcpsrv_call_later(loop, 1, count_up, &ran);
    CHECK_INT(tcpsrv_sleep(10), 0);
    CHECK_INT(ran, 1);
    tcpsrv_call_soon(loop, count_up, &ran);
    CHECK_INT(tcpsrv_yield(), 0);
    CHECK_INT(ran, 2);
    CHECK_INT(test_pair(fds), 0);
    CHECK_INT(tcpsrv_wait_fd(fds[0], TCPSRV_WRITE, -1), TCPSRV_WRITE);
    CHECK_INT(tcpsrv_wait_fd(fds[0], TCPSRV_READ, 10), TCPSRV_ETIMEDOUT);
    CHECK_INT(tcpsrv_join(spawn(give, number(3))), 3);
    end();
    close(fds[0]);
    close(fds[1]);
}

static void park_outside_a_coroutine_is_refused(void) {
    begin();
    CHECK_INT(tcpsrv_park(0), TCPSRV_ENOTCORO);
    CHECK_INT(tcpsrv_park(-1), TCPSRV_ENOTCORO);
    CHECK(tcpsrv_last_error()[0] != 0);
    end();
}

static void wait_in_a_callback(void *id) {
    CHECK_INT(tcpsrv_sleep(1), TCPSRV_ENOTCORO);
    CHECK(tcpsrv_last_error()[0] != 0);
    CHECK_INT(tcpsrv_yield(), TCPSRV_ENOTCORO);
    CHECK_INT(tcpsrv_park(1), TCPSRV_ENOTCORO);
    CHECK_INT(tcpsrv_wait_fd(0, TCPSRV_READ, 1), TCPSRV_ENOTCORO);
    CHECK_INT(tcpsrv_join(*(int64_t *)id), TCPSRV_ENOTCORO);
    note(letter("x"));
}

static void waiting_calls_in_a_callback_are_refused(void) {
    int64_t id;
    begin();
    id = spawn(sleep_and_give, number(4));
    tcpsrv_call_soon(loop, wait_in_a_callback, &id);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_STR(trace, "x");
    CHECK_INT(tcpsrv_join(id), 4);
    end();
}

static void stop_ends_a_wait_outside_coroutines(void) {
    begin();
    tcpsrv_call_later(loop, 1, stop, NULL);
    CHECK_INT(tcpsrv_sleep(20000), TCPSRV_ECANCELED);
    CHECK_INT(tcpsrv_sleep(1), 0); /* the stop was for that one */
    end();
}

static int turn_the_loop(void *arg) {
    (void)arg;
    CHECK_INT(tcpsrv_loop_run(loop), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), TCPSRV_EBUSY);
    CHECK_INT(tcpsrv_loop_free(loop), TCPSRV_EBUSY);
    return 5;
}

static void run_poll_and_free_are_refused_in_a_coroutine(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(turn_the_loop, NULL)), 5);
    end();
}

static int sleep_on_the_other_loop(void *flag) {
    int err = tcpsrv_sleep(5);
    *(int *)flag = err ? err : 1;
    return err;
}

static void calls_without_a_loop_mean_the_coroutines_own(void) {
    tcpsrv_loop *other = tcpsrv_loop_new();
    int flag = 0;
    begin();
    CHECK(other != NULL);
    CHECK(tcpsrv_spawn(other, sleep_on_the_other_loop, &flag, 0) > 0);
    CHECK_INT(tcpsrv_sleep(20), 0); /* the default loop's turns are not the other's */
    CHECK_INT(flag, 0);
    while (!flag) CHECK_INT(tcpsrv_loop_poll(other, 1000), 0);
    CHECK_INT(flag, 1);
    CHECK_INT(tcpsrv_loop_free(other), 0);
    end();
}

/* ---- park and wake --------------------------------------------------------------------------- */

static int park_and_note(void *text) {
    int err = tcpsrv_park(-1);
    note(text);
    return err;
}

static int wake_it(void *id) {
    tcpsrv_wake(loop, *(int64_t *)id);
    note(letter("w"));
    return 0;
}

static void wake_ends_a_park_but_not_inside_the_call(void) {
    int64_t parked, waker;
    begin();
    parked = spawn(park_and_note, letter("p"));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    waker = spawn(wake_it, &parked);
    CHECK_INT(tcpsrv_join(parked), 0);
    CHECK_INT(tcpsrv_join(waker), 0);
    CHECK_STR(trace, "wp");
    end();
}

static int park_after_yields(void *arg) {
    int first, second;
    (void)arg;
    if (tcpsrv_yield() != 0 || tcpsrv_yield() != 0) return 1;
    first = tcpsrv_park(-1);
    second = tcpsrv_park(5);
    return first == 0 && second == TCPSRV_ETIMEDOUT ? 0 : 2;
}

static void a_wake_before_the_park_is_remembered_once(void) {
    int64_t id;
    begin();
    id = spawn(park_after_yields, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_wake(loop, id);
    tcpsrv_wake(loop, id);
    tcpsrv_wake(loop, id);
    CHECK_INT(tcpsrv_join(id), 0);
    end();
}

static void a_wake_before_the_first_run_is_remembered(void) {
    int64_t id;
    begin();
    id = spawn(park_and_note, letter("p"));
    tcpsrv_wake(loop, id);
    CHECK_INT(tcpsrv_join(id), 0);
    CHECK_STR(trace, "p");
    end();
}

static int park_10_ms(void *arg) {
    uint64_t start = test_ns();
    (void)arg;
    if (tcpsrv_park(10) != TCPSRV_ETIMEDOUT) return 1;
    if (test_ns() - start < 10 * MS) return 2;
    return tcpsrv_park(0) == TCPSRV_ETIMEDOUT ? 0 : 3;
}

static void park_ends_when_its_time_has_passed(void) {
    begin();
    CHECK_INT(tcpsrv_join(spawn(park_10_ms, NULL)), 0);
    end();
}

static int park_twice(void *arg) {
    int first = tcpsrv_park(20), second;
    (void)arg;
    second = tcpsrv_park(60);
    return first == 0 && second == TCPSRV_ETIMEDOUT ? 0 : 1;
}

static void the_time_of_an_earlier_park_does_not_end_a_later_one(void) {
    uint64_t start;
    int64_t id;
    begin();
    id = spawn(park_twice, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_wake(loop, id);
    start = test_ns();
    CHECK_INT(tcpsrv_join(id), 0);
    CHECK(test_ns() - start >= 60 * MS);
    end();
}

static void waking_a_dead_id_does_nothing(void) {
    int64_t dead, timer, alive;
    int count = 0;
    begin();
    dead = spawn(give, number(1));
    CHECK_INT(tcpsrv_join(dead), 1);
    timer = tcpsrv_call_later(loop, 1000, count_up, &count);
    alive = spawn(park_10_ms, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_wake(loop, dead);
    tcpsrv_wake(loop, timer);
    tcpsrv_wake(loop, 0);
    tcpsrv_wake(loop, -1);
    tcpsrv_wake(loop, INT64_MAX);
    CHECK_INT(tcpsrv_join(alive), 0);
    CHECK_INT(count, 0);
    end();
}

static void a_coroutine_that_has_ended_may_be_woken_before_it_is_joined(void) {
    int64_t id;
    begin();
    id = spawn(give, number(9));
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_wake(loop, id);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_join(id), 9);
    end();
}

static int sleep_then_park(void *arg) {
    uint64_t start = test_ns();
    (void)arg;
    if (tcpsrv_sleep(20) != 0 || test_ns() - start < 20 * MS) return 1;
    return tcpsrv_park(0);
}

static void a_wake_does_not_end_a_sleep_but_is_remembered_for_the_park(void) {
    int64_t id;
    begin();
    id = spawn(sleep_then_park, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    tcpsrv_wake(loop, id);
    CHECK_INT(tcpsrv_join(id), 0);
    end();
}

static int64_t parked_id;

static void wake_posted(void *arg) {
    (void)arg;
    tcpsrv_wake(loop, parked_id);
}

static void *post_a_wake(void *arg) {
    test_sleep_ms(20);
    return tcpsrv_post(loop, wake_posted, NULL) == 0 ? arg : NULL;
}

static void another_thread_wakes_by_post(void) {
    pthread_t thread;
    begin();
    parked_id = spawn(park_and_note, letter("p"));
    CHECK_INT(pthread_create(&thread, NULL, post_a_wake, NULL), 0);
    CHECK_INT(tcpsrv_join(parked_id), 0);
    CHECK_STR(trace, "p");
    CHECK_INT(pthread_join(thread, NULL), 0);
    end();
}

/* A channel of one place, as the manual has it in mind: made of park and wake alone. */
typedef struct channel {
    int value, full;
    int64_t reader, writer;
} channel;

static int produce(void *arg) {
    channel *ch = (channel *)arg;
    int i;
    for (i = 1; i <= 100; i++) {
        while (ch->full) {
            ch->writer = tcpsrv_self();
            if (tcpsrv_park(-1) != 0) return 1;
        }
        ch->value = i;
        ch->full = 1;
        tcpsrv_wake(loop, ch->reader);
    }
    return 0;
}

static int consume(void *arg) {
    channel *ch = (channel *)arg;
    int i, sum = 0;
    ch->reader = tcpsrv_self();
    for (i = 0; i < 100; i++) {
        while (!ch->full)
            if (tcpsrv_park(-1) != 0) return -1;
        sum += ch->value;
        ch->full = 0;
        tcpsrv_wake(loop, ch->writer);
    }
    return sum;
}

static void a_channel_can_be_made_of_park_and_wake(void) {
    channel ch = { 0, 0, 0, 0 };
    int64_t producer, consumer;
    begin();
    consumer = spawn(consume, &ch);
    producer = spawn(produce, &ch);
    CHECK_INT(tcpsrv_join(consumer), 5050);
    CHECK_INT(tcpsrv_join(producer), 0);
    end();
}

/* A periodic call wakes it; of the wakes that come while it is busy one is remembered. */
static int beats, beats_begun, beats_ended;

static void on_beat(void *id) {
    beats++;
    tcpsrv_wake(loop, *(int64_t *)id);
}

static int take_25_ms_a_beat(void *unused) {
    (void)unused;
    while (beats_ended < 3) {
        CHECK_INT(tcpsrv_park(-1), 0);
        CHECK_INT(beats_begun++, beats_ended);
        CHECK_INT(tcpsrv_sleep(25), 0);
        beats_ended++;
    }
    return 0;
}

static void a_periodic_coroutine_does_not_overlap_itself(void) {
    int64_t id, periodic;
    begin();
    id = spawn(take_25_ms_a_beat, NULL);
    periodic = tcpsrv_call_every(loop, 10, on_beat, &id);
    CHECK_INT(tcpsrv_join(id), 0);
    tcpsrv_cancel(loop, periodic);
    CHECK_INT(beats_begun, 3);
    CHECK_INT(beats_ended, 3);
    CHECK(beats >= 3);
    end();
}

/* ---- wait_fd --------------------------------------------------------------------------------- */

static int pair[2];

static int wait_for_each_event(void *arg) {
    char byte;
    (void)arg;
    CHECK_INT(tcpsrv_wait_fd(pair[0], TCPSRV_READ, 5), TCPSRV_ETIMEDOUT);
    CHECK_INT(tcpsrv_wait_fd(pair[0], TCPSRV_WRITE, -1), TCPSRV_WRITE);
    CHECK_INT(write(pair[1], "x", 1), 1);
    CHECK_INT(tcpsrv_wait_fd(pair[0], TCPSRV_READ, 1000), TCPSRV_READ);
    CHECK_INT(tcpsrv_wait_fd(pair[0], TCPSRV_READ, 1000), TCPSRV_READ);
    CHECK_INT(read(pair[0], &byte, 1), 1);
    CHECK_INT(tcpsrv_wait_fd(pair[0], TCPSRV_READ, 0), TCPSRV_ETIMEDOUT);
    return 0;
}

static void wait_fd_tells_the_events_or_the_timeout(void) {
    begin();
    CHECK_INT(test_pair(pair), 0);
    CHECK_INT(tcpsrv_join(spawn(wait_for_each_event, NULL)), 0);
    end();
    close(pair[0]);
    close(pair[1]);
}

static int wait_for_the_impossible(void *file) {
    int regular = fileno((FILE *)file);
    CHECK_INT(tcpsrv_wait_fd(regular, TCPSRV_READ, 1000), -EPERM);
    CHECK_INT(tcpsrv_wait_fd(-1, TCPSRV_READ, 1000), -EBADF);
    return 0;
}

static int wait_readable(void *arg) {
    (void)arg;
    return tcpsrv_wait_fd(pair[0], TCPSRV_READ, 1000);
}

static void wait_fd_has_the_errors_of_watch_fd(void) {
    FILE *file = tmpfile();
    int64_t first, second;
    begin();
    CHECK(file != NULL);
    CHECK_INT(tcpsrv_join(spawn(wait_for_the_impossible, file)), 0);
    CHECK_INT(test_pair(pair), 0);
    first = spawn(wait_readable, NULL);
    second = spawn(wait_readable, NULL);
    CHECK_INT(tcpsrv_join(second), -EEXIST);
    CHECK_INT(write(pair[1], "x", 1), 1);
    CHECK_INT(tcpsrv_join(first), TCPSRV_READ);
    end();
    fclose(file);
    close(pair[0]);
    close(pair[1]);
}

static int play(void *side) {
    int fd = pair[give(side)], i;
    char byte;
    for (i = 0; i < 50; i++) {
        if (give(side) == 0 && write(fd, "x", 1) != 1) return 1;
        if (tcpsrv_wait_fd(fd, TCPSRV_READ, 5000) != TCPSRV_READ) return 2;
        if (read(fd, &byte, 1) != 1) return 3;
        if (give(side) == 1 && write(fd, "x", 1) != 1) return 4;
    }
    return 0;
}

static void two_coroutines_play_ping_pong_over_a_foreign_socket(void) {
    int64_t ids[2];
    begin();
    CHECK_INT(test_pair(pair), 0);
    ids[0] = spawn(play, number(0));
    ids[1] = spawn(play, number(1));
    CHECK_INT(tcpsrv_join(ids[0]), 0);
    CHECK_INT(tcpsrv_join(ids[1]), 0);
    end();
    close(pair[0]);
    close(pair[1]);
}

/* ---- errors ---------------------------------------------------------------------------------- */

static int park_and_keep_the_error(void *text) {
    if (tcpsrv_park(10) != TCPSRV_ETIMEDOUT) return 1;
    snprintf((char *)text, 200, "%s", tcpsrv_last_error());
    return 0;
}

/* Wakes in the same turn as the other one's park ends, and fails before that one goes on. */
static int sleep_and_fail(void *text) {
    int i;
    for (i = 0; i < 30; i++) {
        if (tcpsrv_sleep(1) != 0) return 1;
        if (tcpsrv_join(-1) != -ESRCH) return 2;
    }
    snprintf((char *)text, 200, "%s", tcpsrv_last_error());
    return 0;
}

static void fail_in_a_callback(void *arg) {
    (void)arg;
    CHECK_INT(tcpsrv_call_every(loop, 0, stop, NULL), -EINVAL);
}

static void last_error_is_not_overwritten_by_another_coroutine(void) {
    char mine[200] = "", other[200] = "";
    int64_t ids[2];
    begin();
    ids[0] = spawn(park_and_keep_the_error, mine);
    ids[1] = spawn(sleep_and_fail, other);
    tcpsrv_call_every(loop, 1, fail_in_a_callback, NULL);
    CHECK_INT(tcpsrv_join(ids[0]), 0);
    CHECK_INT(tcpsrv_join(ids[1]), 0);
    CHECK(strstr(mine, tcpsrv_strerror(TCPSRV_ETIMEDOUT)) != NULL);
    CHECK(strstr(other, strerror(ESRCH)) != NULL);
    end();
}

/* ---- the end of the loop --------------------------------------------------------------------- */

typedef struct parked {
    int kind;
    int64_t joined;
    int result, after, unwound;
} parked;

static int park_somehow(void *arg) {
    parked *self = (parked *)arg;
    switch (self->kind) {
    case 0: self->result = tcpsrv_park(-1); break;
    case 1: self->result = tcpsrv_park(60000); break;
    case 2: self->result = tcpsrv_sleep(60000); break;
    case 3: self->result = tcpsrv_wait_fd(pair[0], TCPSRV_READ, -1); break;
    case 4: self->result = tcpsrv_wait_fd(pair[1], TCPSRV_READ, 60000); break;
    default: self->result = tcpsrv_join(self->joined); break;
    }
    self->after = tcpsrv_sleep(1);
    if (tcpsrv_park(-1) != TCPSRV_ECANCELED || tcpsrv_yield() != TCPSRV_ECANCELED) return 1;
    if (tcpsrv_wait_fd(pair[0], TCPSRV_READ, -1) != TCPSRV_ECANCELED) return 1;
    self->unwound = 1;
    return 0;
}

static void free_resumes_every_waiting_coroutine_with_ecanceled(void) {
    parked all[6];
    int64_t first = 0;
    int i;
    memset(all, 0, sizeof all);
    CHECK_INT(test_pair(pair), 0);
    begin();
    for (i = 0; i < 6; i++) {
        all[i].kind = i;
        all[i].joined = first;
        if (i == 0) first = spawn(park_somehow, &all[i]);
        else spawn(park_somehow, &all[i]);
    }
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
    for (i = 0; i < 6; i++) {
        int has_result = all[i].joined != 0 && all[i].kind == 5 && all[i].result == 0;
        CHECK(all[i].result == TCPSRV_ECANCELED || has_result);
        CHECK_INT(all[i].after, TCPSRV_ECANCELED);
        CHECK_INT(all[i].unwound, 1);
    }
    close(pair[0]);
    close(pair[1]);
}

static int yield_until_cancelled(void *result) {
    int err;
    do
        err = tcpsrv_yield();
    while (err == 0);
    *(int *)result = err;
    return err;
}

static void free_ends_coroutines_that_were_about_to_run(void) {
    int results[3] = { 0, 0, 0 }, i;
    begin();
    for (i = 0; i < 3; i++) spawn(yield_until_cancelled, &results[i]);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
    for (i = 0; i < 3; i++) CHECK_INT(results[i], TCPSRV_ECANCELED);
}

static void free_after_spawn_leaves_nothing(void) {
    int i, woken = 0;
    begin();
    for (i = 0; i < 100; i++) spawn(park_and_count, &woken);
    end();
    CHECK_INT(woken, 0);
}

static int make_more_while_ending(void *arg) {
    int err = tcpsrv_park(-1);
    tcpsrv_call_later(loop, 1, count_up, arg);
    tcpsrv_post(loop, count_up, arg);
    tcpsrv_spawn(loop, park_and_count, arg, 0);
    return err;
}

static void what_coroutines_make_while_they_unwind_is_dropped_too(void) {
    int i, count = 0;
    begin();
    for (i = 0; i < 10; i++) spawn(make_more_while_ending, &count);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    end();
    CHECK_INT(count, 0);
}

static int never_give_up(void *calls) {
    for (;;) {
        ++*(int *)calls;
        if (tcpsrv_sleep(1000) == 0) return 0;
    }
}

/* What the library says on stderr meanwhile. */
static void free_and_listen(char *said, size_t size) {
    int fds[2], saved = dup(2);
    ssize_t n;
    CHECK_INT(pipe(fds), 0);
    CHECK(saved >= 0 && dup2(fds[1], 2) == 2);
    end();
    CHECK(dup2(saved, 2) == 2);
    close(fds[1]);
    n = read(fds[0], said, size - 1);
    said[n > 0 ? n : 0] = 0;
    close(fds[0]);
    close(saved);
}

static void one_that_waits_1000_times_more_is_abandoned_with_a_log_line(void) {
    char said[4000];
    int calls = 0, woken = 0;
    begin();
    spawn(never_give_up, &calls);
    spawn(park_and_count, &woken);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    CHECK_INT(calls, 1);
    free_and_listen(said, sizeof said);
    CHECK(calls >= 1001 && calls <= 1002);
    CHECK(strstr(said, "coroutine") != NULL);
    CHECK_INT(said[strlen(said) - 1], '\n');
}

static int abandon_inside_park(void *arg) {
    int err;
    (void)arg;
    do
        err = tcpsrv_park(-1);
    while (err != 0);
    return 0;
}

static void many_that_do_not_give_up_are_abandoned_each(void) {
    char said[4000];
    int i;
    begin();
    for (i = 0; i < 10; i++) spawn(abandon_inside_park, NULL);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    free_and_listen(said, sizeof said);
    CHECK(strlen(said) > 0);
}

static int sleep_a_while(void *arg) {
    int *left = (int *)arg, err = 0;
    while (!err && --*left > 0) err = tcpsrv_sleep(1);
    return err;
}

static void a_loop_runs_on_after_others_were_freed(void) {
    int i, left = 5;
    tcpsrv_loop *other = tcpsrv_loop_new();
    begin();
    for (i = 0; i < 10; i++) CHECK(tcpsrv_spawn(other, abandon_inside_park, NULL, 0) > 0);
    CHECK_INT(tcpsrv_loop_poll(other, 0), 0);
    CHECK_INT(tcpsrv_join(spawn(sleep_a_while, &left)), 0);
    {
        tcpsrv_loop *kept = loop;
        char said[4000];
        loop = other;
        free_and_listen(said, sizeof said);
        loop = kept;
    }
    left = 5;
    CHECK_INT(tcpsrv_join(spawn(sleep_a_while, &left)), 0);
    end();
}

/* ---- out of memory --------------------------------------------------------------------------- */

static void spawn_without_memory_is_refused_and_leaks_nothing(void) {
    int64_t n = 0, id, ids[300];
    int count = 0, i, refused = 0;
    begin();
    do {
        test_fail_alloc_at = ++n;
        for (count = 0; count < 150; count++) {
            id = ids[count] = tcpsrv_spawn(loop, give, number(count), 0);
            if (id < 0) break;
        }
        if (test_fail_alloc_at == 0) {
            CHECK_INT(ids[count < 150 ? count : 0], -ENOMEM);
            refused++;
        }
        test_fail_alloc_at = 0;
        for (i = 0; i < count; i++) CHECK_INT(tcpsrv_join(ids[i]), i);
    } while (count < 150);
    CHECK(refused > 0);
    end();
}

static int wait_in_each_way(void *arg) {
    int err = tcpsrv_sleep(0);
    (void)arg;
    if (!err) err = tcpsrv_wait_fd(pair[0], TCPSRV_WRITE, 1000) < 0 ? -ENOMEM : 0;
    if (!err && tcpsrv_park(0) == -ENOMEM) err = -ENOMEM;
    return err;
}

static void waiting_without_memory_is_a_code(void) {
    int64_t n, id;
    int result;
    CHECK_INT(test_pair(pair), 0);
    for (n = 1; n < 50; n++) {
        begin();
        id = spawn(wait_in_each_way, NULL);
        test_fail_alloc_at = n;
        result = tcpsrv_join(id);
        CHECK(result == 0 || (result == -ENOMEM && test_fail_alloc_at == 0));
        test_fail_alloc_at = 0;
        end();
    }
    close(pair[0]);
    close(pair[1]);
}

/* Address space for stacks may run out as well. */
static void spawn_without_address_space_is_refused(void) {
    struct rlimit limit, tight;
    int64_t id, last = 1;
    int i, count = 0, woken = 0;
    if (is_slow()) return; /* these need the space themselves */
    begin();
    CHECK_INT(getrlimit(RLIMIT_AS, &limit), 0);
    tight = limit;
    tight.rlim_cur = (rlim_t)96 << 20;
    CHECK_INT(setrlimit(RLIMIT_AS, &tight), 0);
    for (i = 0; i < 20000 && last > 0; i++) {
        last = tcpsrv_spawn(loop, park_and_count, &woken, 0);
        count += last > 0;
    }
    CHECK_INT(last, -ENOMEM);
    CHECK(strlen(tcpsrv_last_error()) > 0);
    CHECK_INT(setrlimit(RLIMIT_AS, &limit), 0);
    CHECK_INT(tcpsrv_loop_poll(loop, 0), 0);
    id = spawn(give, number(count));
    CHECK_INT(tcpsrv_join(id), count);
    end();
}

/* Long enough for a timer that counts the process's own time; nothing of the C library is called,
   where a sanitizer might look for what has come. */
static int spin(void *arg) {
    struct itimerval soon = { { 0, 0 }, { 0, 2000 } };
    volatile int i;
    (void)arg;
    setitimer(ITIMER_VIRTUAL, &soon, NULL);
    for (i = 0; i < 50000000; i++) continue;
    return 0;
}

static void note_signal(int signo, void *times) {
    CHECK_INT(signo, SIGVTALRM);
    ++*(int *)times;
}

static void a_signal_that_comes_while_a_coroutine_runs_is_told_to_the_loop(void) {
    int told = 0, turns;
    begin();
    CHECK(tcpsrv_on_signal(loop, SIGVTALRM, note_signal, &told) > 0);
    spawn(spin, NULL);
    for (turns = 0; turns < 100 && !told; turns++) CHECK_INT(tcpsrv_loop_poll(loop, 10), 0);
    CHECK_INT(told, 1);
    end();
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(a_coroutine_runs_from_the_next_turn_on_in_the_order_of_the_calls),
        TEST(a_coroutine_spawned_by_one_does_not_run_inside_it),
        TEST(join_gives_the_result_once),
        TEST(any_result_ends_a_join),
        TEST(join_of_an_unknown_id_is_refused),
        TEST(join_waits_for_the_end),
        TEST(a_second_joiner_is_refused),
        TEST(joining_oneself_is_refused),
        TEST(self_is_the_running_coroutine_and_0_outside),
        TEST(results_are_kept_for_the_last_65536),
        TEST(without_memory_for_results_the_oldest_is_forgotten),
        TEST(dead_ids_never_meet_new_coroutines),
        TEST(stacks_have_at_least_the_size_asked_for),
        TEST(a_stack_is_taken_again_for_another_layout),
        TEST(registers_survive_the_switches),
        TEST(a_stack_overflow_meets_the_guard),
        TEST(twenty_thousand_coroutines_park_and_wake),
        TEST(coroutines_that_come_and_go_need_little_memory),
#if defined(__linux__)
        TEST(stacks_are_unmapped_with_their_loop),
#endif
        TEST(yield_lets_each_of_the_others_run_once),
        TEST(yielding_starves_neither_timers_nor_descriptors),
        TEST(sleepers_wake_in_the_order_of_their_deadlines),
        TEST(sleep_is_never_cut_short),
        TEST(a_thousand_sleep_side_by_side),
        TEST(sleep_0_returns_and_lets_others_run),
        TEST(a_waiting_call_outside_runs_the_loop),
        TEST(park_outside_a_coroutine_is_refused),
        TEST(waiting_calls_in_a_callback_are_refused),
        TEST(stop_ends_a_wait_outside_coroutines),
        TEST(run_poll_and_free_are_refused_in_a_coroutine),
        TEST(calls_without_a_loop_mean_the_coroutines_own),
        TEST(wake_ends_a_park_but_not_inside_the_call),
        TEST(a_wake_before_the_park_is_remembered_once),
        TEST(a_wake_before_the_first_run_is_remembered),
        TEST(park_ends_when_its_time_has_passed),
        TEST(the_time_of_an_earlier_park_does_not_end_a_later_one),
        TEST(waking_a_dead_id_does_nothing),
        TEST(a_coroutine_that_has_ended_may_be_woken_before_it_is_joined),
        TEST(a_wake_does_not_end_a_sleep_but_is_remembered_for_the_park),
        TEST(another_thread_wakes_by_post),
        TEST(a_channel_can_be_made_of_park_and_wake),
        TEST(a_periodic_coroutine_does_not_overlap_itself),
        TEST(wait_fd_tells_the_events_or_the_timeout),
        TEST(wait_fd_has_the_errors_of_watch_fd),
        TEST(two_coroutines_play_ping_pong_over_a_foreign_socket),
        TEST(last_error_is_not_overwritten_by_another_coroutine),
        TEST(free_resumes_every_waiting_coroutine_with_ecanceled),
        TEST(free_ends_coroutines_that_were_about_to_run),
        TEST(free_after_spawn_leaves_nothing),
        TEST(what_coroutines_make_while_they_unwind_is_dropped_too),
        TEST(one_that_waits_1000_times_more_is_abandoned_with_a_log_line),
        TEST(many_that_do_not_give_up_are_abandoned_each),
        TEST(a_loop_runs_on_after_others_were_freed),
        TEST(spawn_without_memory_is_refused_and_leaks_nothing),
        TEST(waiting_without_memory_is_a_code),
        TEST(spawn_without_address_space_is_refused),
        TEST(a_signal_that_comes_while_a_coroutine_runs_is_told_to_the_loop),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
