/* The inner loop of LtHash, for x86-64 with AVX2: 2,048 bytes of BLAKE3 extended output for each element, summed as
 * 1,024 lanes of u16. What it computes is said in lthash.py, which checks it against the `blake3` package when it is
 * loaded and does without it where it cannot run.
 *
 * Why it is here: `blake3` expands one block of output at a time where a processor has no AVX-512, so an element takes
 * 3.8 us; eight blocks side by side take 0.8.
 *
 * BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs, sections 2.2 (compression), 2.4 (chunks), 2.6 (extended output).
 */

#include <cpuid.h>
#include <stddef.h>
#include <stdint.h>

#define ELEMENT_BYTES_MAX 1024 /* one BLAKE3 chunk: longer elements are a tree, and rare */
#define BLOCK_BYTES 64
#define BLOCK_WORDS 16
#define OUTPUT_BLOCKS 32
#define WIDTH 8

enum flag { CHUNK_START = 1, CHUNK_END = 2, ROOT = 8 };

typedef uint32_t lanes __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t sums __attribute__((vector_size(4 * WIDTH)));

static const uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                               0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/* Which word of the message goes where, round by round. */
static const uint8_t ORDER[7][BLOCK_WORDS] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1},
    {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4},
    {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

#define TURN(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

#define MIX(a, b, c, d, one, other) \
    a += b + (one);                 \
    d = TURN(d ^ a, 16);            \
    c += d;                         \
    b = TURN(b ^ c, 12);            \
    a += b + (other);               \
    d = TURN(d ^ a, 8);             \
    c += d;                         \
    b = TURN(b ^ c, 7);

/* All rounds over a state `v`, of single words or of lanes. */
#define ROUNDS(v, words)                                                  \
    _Pragma("GCC unroll 7") for (int round = 0; round < 7; round++) {     \
        const uint8_t *at = ORDER[round];                                 \
        MIX(v[0], v[4], v[8], v[12], words[at[0]], words[at[1]])          \
        MIX(v[1], v[5], v[9], v[13], words[at[2]], words[at[3]])          \
        MIX(v[2], v[6], v[10], v[14], words[at[4]], words[at[5]])         \
        MIX(v[3], v[7], v[11], v[15], words[at[6]], words[at[7]])         \
        MIX(v[0], v[5], v[10], v[15], words[at[8]], words[at[9]])         \
        MIX(v[1], v[6], v[11], v[12], words[at[10]], words[at[11]])       \
        MIX(v[2], v[7], v[8], v[13], words[at[12]], words[at[13]])        \
        MIX(v[3], v[4], v[9], v[14], words[at[14]], words[at[15]])        \
    }

/* One block of a chunk into its chaining value. */
__attribute__((target("avx2")))
static void chain(uint32_t value[8], const uint32_t words[BLOCK_WORDS], uint32_t flags) {
    uint32_t v[16] = {value[0], value[1], value[2], value[3], value[4], value[5], value[6],    value[7],
                      IV[0],    IV[1],    IV[2],    IV[3],    0,        0,        BLOCK_BYTES, flags};
    ROUNDS(v, words)
    for (int word = 0; word < 8; word++)
        value[word] = v[word] ^ v[word + 8];
}

/* The extended output of a root's last block, eight blocks of output at a time, added to `total`: word by word, and of
 * each word all blocks, as they lie in the registers. */
__attribute__((target("avx2")))
static void expand(const uint32_t value[8], const uint32_t words[BLOCK_WORDS], uint32_t size, uint32_t flags,
                   sums total[BLOCK_WORDS][OUTPUT_BLOCKS / WIDTH]) {
    for (uint32_t at = 0; at < OUTPUT_BLOCKS / WIDTH; at++) {
        lanes v[16];
        for (int word = 0; word < 8; word++)
            v[word] = (lanes){} + value[word];
        for (int word = 0; word < 4; word++)
            v[8 + word] = (lanes){} + IV[word];
        v[12] = (lanes){0, 1, 2, 3, 4, 5, 6, 7} + WIDTH * at;
        v[13] = (lanes){};
        v[14] = (lanes){} + size;
        v[15] = (lanes){} + flags;
        ROUNDS(v, words)
        for (int word = 0; word < 8; word++) {
            total[word][at] += (sums)(v[word] ^ v[word + 8]);
            total[word + 8][at] += (sums)(v[word + 8] ^ value[word]);
        }
    }
}

static void read_words(uint32_t words[BLOCK_WORDS], const uint8_t *bytes, uint32_t count) {
    uint8_t block[BLOCK_BYTES] = {0};
    __builtin_memcpy(block, bytes, count);
    __builtin_memcpy(words, block, BLOCK_BYTES);
}

/* Whether this processor, and the system on it, have AVX2. */
int lattice_runs_here(void) {
    unsigned a, b, c, d, kept, kept_high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return 0;
    __asm__("xgetbv" : "=a"(kept), "=d"(kept_high) : "c"(0));
    return (kept & 6) == 6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 5 & 1);
}

/* The sum of `count` elements, which lie one behind the other, none longer than ELEMENT_BYTES_MAX, into `vector`: 1,024
 * lanes. */
__attribute__((target("avx2")))
void lattice_sum(const uint8_t *elements, const uint32_t *sizes, size_t count, uint16_t *vector) {
    sums total[BLOCK_WORDS][OUTPUT_BLOCKS / WIDTH] = {0};
    for (size_t number = 0; number < count; number++) {
        uint32_t value[8], words[BLOCK_WORDS], left = sizes[number], flags = CHUNK_START;
        __builtin_memcpy(value, IV, sizeof value);
        for (; left > BLOCK_BYTES; left -= BLOCK_BYTES, elements += BLOCK_BYTES, flags = 0) {
            __builtin_memcpy(words, elements, BLOCK_BYTES);
            chain(value, words, flags);
        }
        read_words(words, elements, left);
        expand(value, words, left, flags | CHUNK_END | ROOT, total);
        elements += left;
    }
    const uint32_t *summed = (const uint32_t *)total;
    for (int block = 0; block < OUTPUT_BLOCKS; block++)
        for (int word = 0; word < BLOCK_WORDS; word++)
            __builtin_memcpy(vector + 2 * (block * BLOCK_WORDS + word), summed + word * OUTPUT_BLOCKS + block, 4);
}
