/* BearSSL as the library sees it here. Its randomness is the simulation's, what it computes on
   curves is remembered, so that a handshake that was made once costs next to nothing, and the model
   is told what goes into an engine and what comes out of it. */
#ifndef SIM_CRYPTO_H
#define SIM_CRYPTO_H

#include "network.h"
#include <bearssl.h>

/* model.h: the library has given an engine so many bytes to encrypt, has sent, has taken so many
   decrypted ones, closes. */
static void model_secure_write(br_ssl_engine_context *core, size_t size);
static void model_secure_sent(br_ssl_engine_context *core);
static void model_secure_read(br_ssl_engine_context *core, size_t size);
static void model_secure_close(br_ssl_engine_context *core);

/* ---- randomness ------------------------------------------------------------------------------ */

/* The n-th of a run is the same in all runs: few handshakes differ. */
static void sim_entropy(int number, void *memory, size_t size) {
    unsigned char *at = (unsigned char *)memory;
    uint64_t x = (uint64_t)number;
    while (size--) {
        x = sim_mix(x);
        *at++ = (unsigned char)x;
    }
}

SIM_PRIVATE int sim_getentropy(void *memory, size_t size) {
    int error = sim_enter(CALL_ENTROPY);
    if (error) return sim_fail(error);
    sim_entropy(++sim.entropies, memory, size);
    return 0;
}

/* Else an engine would ask the processor as well. */
static void sim_inject_entropy(br_ssl_engine_context *core, const void *seed, size_t size) {
    br_ssl_engine_inject_entropy(core, seed, size);
    core->rng_os_rand_done = 1;
}

/* ---- curves ---------------------------------------------------------------------------------- */

enum { SIM_PRODUCTS = 16384, SIM_PRODUCT_INPUT = 256 };

static struct sim_product {         /* of one call */
    unsigned char input[SIM_PRODUCT_INPUT], point[144];
    size_t input_size;              /* 0: free */
    size_t result;
} sim_products[SIM_PRODUCTS];
static int sim_product_count;

typedef struct sim_product_key {
    unsigned char input[SIM_PRODUCT_INPUT];
    size_t size;
} sim_product_key;

static void sim_key_add(sim_product_key *key, const void *memory, size_t size) {
    if (key->size + 1 + size > SIM_PRODUCT_INPUT) sim_broken(0, "a curve's numbers are too large");
    key->input[key->size++] = (unsigned char)size;
    memcpy(key->input + key->size, memory, size);
    key->size += size;
}

static void sim_key_begin(sim_product_key *key, int call, int curve) {
    key->input[0] = (unsigned char)call;
    key->input[1] = (unsigned char)curve;
    key->size = 2;
}

/* Where it is, or where it may be kept; NULL: nowhere. */
static struct sim_product *sim_product_find(const sim_product_key *key) {
    uint64_t x = 0;
    size_t i;
    for (i = 0; i < key->size; i++) x = (x ^ key->input[i]) * 0x100000001b3u;
    for (i = (size_t)(sim_mix(x) % SIM_PRODUCTS);; i = (i + 1) % SIM_PRODUCTS) {
        struct sim_product *product = &sim_products[i];
        if (!product->input_size) break;
        if (product->input_size == key->size &&
            memcmp(product->input, key->input, key->size) == 0)
            return product;
    }
    return sim_product_count < SIM_PRODUCTS / 4 * 3 ? &sim_products[i] : NULL;
}

static size_t sim_product_keep(struct sim_product *product, const sim_product_key *key,
                               const unsigned char *point, size_t size, size_t result) {
    if (!product) return result;
    memcpy(product->input, key->input, key->size);
    memcpy(product->point, point, size);
    product->input_size = key->size;
    product->result = result;
    sim_product_count++;
    return result;
}

static size_t sim_product_take(const struct sim_product *product, unsigned char *point,
                               size_t size) {
    memcpy(point, product->point, size);
    return product->result;
}

/* The library's own computing takes time, in some runs. */
static void sim_compute(void) {
    if (!sim.peers_compute) sim.computed_ns += sim.curve_ns;
}

static uint32_t sim_mul(unsigned char *point, size_t size, const unsigned char *x, size_t x_size,
                        int curve) {
    struct sim_product *product;
    sim_product_key key;
    sim_compute();
    sim_key_begin(&key, 1, curve);
    sim_key_add(&key, point, size);
    sim_key_add(&key, x, x_size);
    product = sim_product_find(&key);
    if (product && product->input_size) return (uint32_t)sim_product_take(product, point, size);
    return (uint32_t)sim_product_keep(product, &key, point, size,
                                      br_ec_get_default()->mul(point, size, x, x_size, curve));
}

static size_t sim_mulgen(unsigned char *point, const unsigned char *x, size_t x_size, int curve) {
    struct sim_product *product;
    sim_product_key key;
    size_t size;
    sim_compute();
    sim_key_begin(&key, 2, curve);
    sim_key_add(&key, x, x_size);
    product = sim_product_find(&key);
    if (product && product->input_size) return sim_product_take(product, point, product->result);
    size = br_ec_get_default()->mulgen(point, x, x_size, curve);
    return sim_product_keep(product, &key, point, size, size);
}

static uint32_t sim_muladd(unsigned char *a, const unsigned char *b, size_t size,
                           const unsigned char *x, size_t x_size, const unsigned char *y,
                           size_t y_size, int curve) {
    struct sim_product *product;
    sim_product_key key;
    sim_compute();
    sim_key_begin(&key, b ? 3 : 4, curve);
    sim_key_add(&key, a, size);
    if (b) sim_key_add(&key, b, size);
    sim_key_add(&key, x, x_size);
    sim_key_add(&key, y, y_size);
    product = sim_product_find(&key);
    if (product && product->input_size) return (uint32_t)sim_product_take(product, a, size);
    return (uint32_t)sim_product_keep(
        product, &key, a, size,
        br_ec_get_default()->muladd(a, b, size, x, x_size, y, y_size, curve));
}

static const br_ec_impl *sim_curves(void) {
    static br_ec_impl curves;
    if (curves.mul) return &curves;
    curves = *br_ec_get_default();
    curves.mul = sim_mul;
    curves.mulgen = sim_mulgen;
    curves.muladd = sim_muladd;
    return &curves;
}

static void sim_set_ecdsa(br_ssl_engine_context *core) {
    br_ssl_engine_set_ec(core, sim_curves());
    br_ssl_engine_set_ecdsa(core, br_ecdsa_vrfy_asn1_get_default());
}

/* ---- what the model is told ------------------------------------------------------------------ */

static void sim_sendapp_ack(br_ssl_engine_context *core, size_t size) {
    model_secure_write(core, size);
    br_ssl_engine_sendapp_ack(core, size);
}

static void sim_sendrec_ack(br_ssl_engine_context *core, size_t size) {
    br_ssl_engine_sendrec_ack(core, size);
    model_secure_sent(core);
}

static void sim_recvapp_ack(br_ssl_engine_context *core, size_t size) {
    model_secure_read(core, size);
    br_ssl_engine_recvapp_ack(core, size);
}

static void sim_engine_close(br_ssl_engine_context *core) {
    model_secure_close(core);
    br_ssl_engine_close(core);
}

#endif
