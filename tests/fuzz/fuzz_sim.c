/* The simulated kernel and its workload, with the fuzzer's bytes in the place of chance. Run by
   tests/fuzz.sh. */
#define SIM_FUZZ 1
#define TCPSERVER_USE_EPOLL
#include "../sim/calls.h"

#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

#include "../sim/peers.h"
#include "../sim/model.h"
#include "../sim/world.h"

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size);

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t size) {
    static int begun;
    struct sim_options_of_run run;
    if (!begun) world_prepare();
    begun = 1;
    memset(&run, 0, sizeof run);
    sim_reset(1, &run);
    sim.bytes = bytes;
    sim.bytes_left = size;
    world_any();
    return 0;
}
