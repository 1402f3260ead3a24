/* Runs the library on a simulated kernel that tries to break its promises.
     sim_POLLER seeds FROM COUNT    random runs, one for each seed
     sim_POLLER seed N              one of them, with a trace
     sim_POLLER exhaustive          short scenarios, in which every call fails once with each of its
                                    errors, and from every call on there is no memory
     sim_POLLER scenario NAME N K   one of them, with a trace: its N-th call fails with its K-th
                                    error, or, K -1, there is no memory from it on
   With TLS (sim_POLLER_tls) servers, clients and their peers speak it, or take it up half-way.
   The exit status is 0 when every promise was kept; else the seed and the promise are printed. */
#include "calls.h"

#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

#include "peers.h"
#ifdef TCPSERVER_TLS
#include "secure.h"
#endif
#include "model.h"
#include "world.h"
#include "scenarios.h"

static double sim_seconds(void) {
    struct timeval now;
    gettimeofday(&now, NULL);
    return (double)now.tv_sec + (double)now.tv_usec / 1e6;
}

/* Whatever ends the process, the seed is known. */
static void sim_died(int signo) {
    sim_print_run();
    printf(signo == SIGALRM ? "does not end\n" : "died of signal %d\n", signo);
    fflush(stdout);
    _exit(1);
}

#ifdef SIM_ASAN
void __sanitizer_set_death_callback(void (*callback)(void));

static void sim_sanitizer_found(void) {
    sim_print_run();
    printf("a sanitizer has found something\n");
    fflush(stdout);
}
#endif

static void sim_watch(void) {
    static char stack[65536];
    static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGALRM };
    struct sigaction action;
    stack_t other;
    int i;
    memset(&other, 0, sizeof other);
    other.ss_sp = stack;
    other.ss_size = sizeof stack;
    sigaltstack(&other, NULL);
    memset(&action, 0, sizeof action);
    action.sa_handler = sim_died;
    action.sa_flags = SA_ONSTACK;
#ifdef SIM_ASAN
    __sanitizer_set_death_callback(sim_sanitizer_found);
    i = 5;
#else
    i = 0;
#endif
    for (; i < 6; i++) (sigaction)(signals[i], &action, NULL);
}

static void world_seed(uint64_t seed, const struct sim_options_of_run *run) {
    sim_reset(seed, run);
    world_any();
}

static int sim_seeds(uint64_t from, uint64_t count) {
    struct sim_options_of_run run;
    double start = sim_seconds(), took;
    uint64_t i, calls = 0, turns = 0, streams = 0, faults = 0;
    memset(&run, 0, sizeof run);
    for (i = 0; i < count; i++) {
        if (i % 64 == 0) alarm(120);
        world_seed(from + i, &run);
        calls += (uint64_t)sim.calls;
        turns += (uint64_t)model.turns;
        streams += (uint64_t)model.count;
        faults += (uint64_t)sim.faults;
    }
    took = sim_seconds() - start;
    printf("%llu seeds from %llu: every promise kept (%.1f s, %.0f a second)\n",
           (unsigned long long)count, (unsigned long long)from, took,
           (double)count / (took > 0 ? took : 1));
    printf("a run has %.1f streams, %.0f turns, %.0f calls, %.2f of which fail\n",
           (double)streams / (double)count, (double)turns / (double)count,
           (double)calls / (double)count, (double)faults / (double)count);
    return 0;
}

int main(int argc, char **argv) {
    struct sim_options_of_run run;
    memset(&run, 0, sizeof run);
    world_prepare();
    sim_watch();
    if (argc == 4 && strcmp(argv[1], "seeds") == 0)
        return sim_seeds(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "seed") == 0) {
        run.trace = 1;
        world_seed(strtoull(argv[2], NULL, 10), &run);
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "exhaustive") == 0) return scenarios_run();
    if (argc == 5 && strcmp(argv[1], "scenario") == 0) {
        run.trace = 1;
        return scenario_show(argv[2], atoi(argv[3]), atoi(argv[4]), &run);
    }
    fprintf(stderr, "usage: %s seeds FROM COUNT | seed N | exhaustive | scenario NAME N K\n",
            argv[0]);
    return 2;
}
