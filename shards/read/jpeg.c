/* Decodes a part of a baseline JPEG: a crop, as RGB, written where it is wanted.
 *
 * In: the bytes of a file and a rectangle of it. Out: its pixels, bit for bit those of libjpeg-turbo (accurate integer
 * inverse DCT, "fancy" upsampling). Files that are unusual or damaged in any way are refused: the caller has a decoder
 * for all of JPEG, which also says what is wrong. Damage anywhere in a file counts, so all of it is entropy-decoded;
 * inverse DCT, upsampling and conversion of colours are done for the rectangle only.
 *
 *                   accepted                                        refused
 *   process         baseline, Huffman, one scan (SOF0)              progressive, lossless, arithmetic, several scans
 *   samples         8 bits                                          12 bits, 16-bit quantisers
 *   components      1 (grey), 3 (Y Cb Cr), numbered from 1          2, 4 (CMYK, YCCK), RGB, other numbers
 *   sampling        4:4:4, 4:2:2 (2x1), 4:2:0 (2x2); grey: 1x1      4:4:0, 4:1:1, subsampled luma, others
 *   size            16 x 16 to 65,535 x 65,535, as the caller says  smaller, another, height in DNL
 *   tables          numbers 0 to 3; the last of a number counts     missing ones, codes that overflow or are all ones,
 *                                                                   DC symbols above 15
 *   markers         JFIF 1.x, Adobe with transform 1, APPn, COM     JFIF 2, Adobe of RGB or CMYK, DRI, RSTn, fill bytes
 *   coded data      every MCU, padded to a byte, then EOI;          too short, too long, unknown codes, values beyond
 *                   whatever follows EOI is ignored                 those an encoder writes (MOST below)
 *
 * Sources: ITU-T T.81 (the format: annex B; Huffman codes: annex C, F.2.2); Loeffler, Ligtenberg, Moschytz, "Practical
 * fast 1-D DCT algorithms with 11 multiplications" (1989); ITU-T T.871 (colours); Giesen, "Reading bits in far too many
 * ways" (2018) for the bit buffer. For x86-64 with AVX2; shards/read/fastjpeg.py compiles it.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, REFUSED = 1 };

/* Bits of a table index. A symbol and the value after it are found by one lookup if both fit: nine times in ten. */
enum { LOOK = 11, CODES = 1 << LOOK };
/* Positions from 64 on are past the end of a block. END_OF_BLOCK leads there from any position. */
enum { END_OF_BLOCK = 128, POSITIONS = 256 };
/* Bytes that may be read after the entropy-coded data (an MCU of damaged data takes at most 384 times 27 bits), and
 * bytes that vectors may write after a row. */
enum { BEHIND_DATA = 2048, BEHIND_ROW = 64 };

/* Bits of the longest code, of the longest value after it (DC: 11, AC: 10), and of both. */
enum { CODE_BITS = 16, VALUE_BITS = 11, SYMBOL_BITS = CODE_BITS + VALUE_BITS, REFILLED = 56 };

typedef struct {
    int32_t look[CODES]; /* value << 16 | positions to advance << 8 | bits; 0: search the table */
    int32_t pairs[CODES]; /* AC: two symbols, if both fit: see read_pairs; 0: see `look` */
    uint32_t limit[18];  /* codes of l bits, left-aligned to 16, are below limit[l]; limit[17] is above all */
    int32_t offset[17];  /* place of the first code of l bits among the symbols, less that code */
    uint16_t codes[CODES]; /* symbol << 8 | bits of its code alone; 0: it has more than LOOK */
    uint8_t symbols[256];
    uint8_t source[16 + 256]; /* the table as the file has it: most files share theirs */
    int size;                 /* bytes of source; 0: there is none */
} Huffman;

typedef struct {
    int h, v;         /* sampling factors */
    int quantiser, dc, ac;
    int columns, rows; /* pixels, without padding */
    int stride;        /* bytes per row of `plane` */
    uint8_t *plane;    /* whole blocks */
} Component;

typedef struct {
    Huffman dc[4], ac[4];
    int32_t quantiser[4][64]; /* in natural order */
    Component component[3];
    int ncomponents, height, width;
    int has_quantiser[4];
    uint8_t *memory; /* entropy-coded data without stuffing, planes, two rows of chroma */
    size_t memory_size;
} Decoder;

static const uint8_t ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static uint8_t NATURAL[POSITIONS]; /* ZIGZAG, and 64 for all positions past the end */

__attribute__((constructor)) static void fill_natural(void) {
    memset(NATURAL, 64, sizeof NATURAL);
    memcpy(NATURAL, ZIGZAG, sizeof ZIGZAG);
}

/* ---- Huffman tables ---- */

static inline int extend(int value, int bits) { /* T.81 F.2.2.1 */
    return bits && value < 1 << (bits - 1) ? value - (1 << bits) + 1 : value;
}

/* Symbol -> bits of the value after it, and positions to advance in the block. 0: not a symbol of a baseline file. */
static int meaning(int symbol, int is_ac, int *value_bits, int *positions) {
    *value_bits = is_ac ? symbol & 15 : symbol;
    *positions = is_ac ? (symbol >> 4) + 1 : 0;
    if (!is_ac)
        return symbol <= 11;
    if (symbol == 0)
        *positions = END_OF_BLOCK;
    return *value_bits <= 10 && (*value_bits || symbol == 0 || symbol == 0xF0);
}

/* An entry for two AC symbols: second value << 24 | first value << 16 | positions to advance for the second << 11 | for
 * the first << 6 | bits of both. If only one fits, the second advances 0 positions and has the same value. The end of
 * the block advances BEYOND positions, to where no coefficient is. */
enum { BEYOND = 31, ENDS = BEYOND << 11, ENDS_AT_ONCE = ENDS | BEYOND << 6 };
/* Below this position the first of two symbols ends the block only if it is the end-of-block symbol. */
enum { PAIRS_UNTIL = 48, MOST_POSITIONS = 16 };
_Static_assert(PAIRS_UNTIL - 1 + MOST_POSITIONS < 64, "the first of two symbols stays within the block");
_Static_assert(LOOK < 64 && MOST_POSITIONS < (int)BEYOND && BEYOND < 32, "6 bits, 5 and 5: the fields of `pairs`");
_Static_assert(PAIRS_UNTIL + 2 * BEYOND <= POSITIONS && 64 + END_OF_BLOCK <= POSITIONS, "NATURAL has all positions");
_Static_assert(SYMBOL_BITS < 256 && END_OF_BLOCK < 256, "8 bits each: the fields of `look`");

static void pair_up(Huffman *table) {
    for (uint32_t i = 0; i < CODES; i++) {
        int32_t first = table->look[i], second = 0;
        uint32_t bits = first & 255, positions = first >> 8 & 255, further = 0;
        table->pairs[i] = 0;
        if (!first || first >> 16 != (int8_t)(first >> 16))
            continue;
        if (positions == END_OF_BLOCK) {
            table->pairs[i] = (int32_t)(ENDS_AT_ONCE | bits);
            continue;
        }
        second = table->look[i << bits & (CODES - 1)];
        if (second && bits + (second & 255) <= LOOK && second >> 16 == (int8_t)(second >> 16)) {
            bits += second & 255;
            further = (second >> 8 & 255) == END_OF_BLOCK ? BEYOND : second >> 8 & 255;
        } else {
            second = first;
        }
        table->pairs[i] = (int32_t)((uint32_t)(second >> 16) << 24 | (uint32_t)(first >> 16 & 255) << 16 |
                                    further << 11 | positions << 6 | bits);
    }
}

static int read_huffman(Huffman *table, const uint8_t *source, int size, int is_ac) {
    if (table->size == size && !memcmp(table->source, source, size))
        return 1;
    table->size = 0;
    memset(table->look, 0, sizeof table->look);
    memset(table->codes, 0, sizeof table->codes);
    memset(table->symbols, 0, sizeof table->symbols);
    memcpy(table->symbols, source + 16, size - 16);
    uint32_t code = 0;
    int next = 0;
    for (int length = 1; length <= 16; length++) {
        table->offset[length] = next - (int)code;
        for (int i = 0; i < source[length - 1]; i++, code++, next++) {
            int bits, positions;
            /* The code of only ones is reserved (T.81 annex C), and libjpeg accepts no DC symbol above 15. */
            if (code >= (1u << length) - 1u || (!is_ac && table->symbols[next] > 15))
                return 0;
            if (length > LOOK)
                continue;
            for (uint32_t rest = 0; rest < 1u << (LOOK - length); rest++)
                table->codes[(code << (LOOK - length)) + rest] = (uint16_t)(table->symbols[next] << 8 | length);
            if (!meaning(table->symbols[next], is_ac, &bits, &positions) || length + bits > LOOK)
                continue;
            int spare = LOOK - length - bits;
            for (int value = 0; value < 1 << bits; value++)
                for (int rest = 0; rest < 1 << spare; rest++)
                    table->look[((code << bits | (uint32_t)value) << spare) + rest] =
                        (int32_t)((uint32_t)extend(value, bits) << 16 | (uint32_t)positions << 8 | (length + bits));
        }
        table->limit[length] = code << (16 - length);
        code <<= 1;
    }
    table->limit[17] = UINT32_MAX;
    if (is_ac)
        pair_up(table);
    memcpy(table->source, source, size);
    table->size = size;
    return 1;
}

/* ---- Entropy-coded data ---- */

typedef struct {
    const uint8_t *at; /* next byte for `bits` */
    uint64_t bits;     /* the first bit is the highest */
    int count;         /* valid bits, at least; after `refill` REFILLED or more */
} Bits;
_Static_assert(REFILLED <= 64 - 8 + 1 && SYMBOL_BITS <= REFILLED, "one refill is enough for one symbol");

static inline __attribute__((always_inline)) void refill(Bits *b) {
    uint64_t word;
    memcpy(&word, b->at, 8);
    b->bits |= __builtin_bswap64(word) >> b->count;
    b->at += (63 - b->count) >> 3;
    b->count |= REFILLED;
}

_Static_assert(SYMBOL_BITS < 64, "a symbol's bits survive the mask of the shift");
static inline __attribute__((always_inline)) void skip(Bits *b, int32_t entry) {
    b->bits <<= entry & 63; /* the shift instruction masks in the same way, so the compiler drops the mask */
    b->count -= entry & 255;
}

/* The entry, as in `look`, of the symbol that `bits` begin with, if `look` lacks it; 0: there is no such symbol. */
static __attribute__((noinline)) int32_t look_long(uint64_t bits, const Huffman *table, int is_ac) {
    int length, symbol, value_bits, positions, value = 0;
    uint32_t code = bits >> 48, known = table->codes[bits >> (64 - LOOK)];
    if (known) {
        length = known & 255;
        symbol = known >> 8;
    } else {
        for (length = LOOK + 1; code >= table->limit[length]; length++)
            ;
        if (length > 16)
            return 0;
        symbol = table->symbols[(table->offset[length] + (int)(code >> (16 - length))) & 255];
    }
    if (!meaning(symbol, is_ac, &value_bits, &positions))
        return 0;
    if (value_bits)
        value = extend((int)(bits << length >> (64 - value_bits)), value_bits);
    return (int32_t)((uint32_t)value << 16 | (uint32_t)positions << 8 | (uint32_t)(length + value_bits));
}

/* Coefficients of a block in natural order; [64] receives what is past the end. */
typedef struct {
    __attribute__((aligned(32))) int16_t at[64];
    int16_t behind[16];
} Block;

/* The entry of the next symbol, whose bits are skipped; 0: damaged. */
static inline __attribute__((always_inline)) int32_t next(Bits *b, const Huffman *table, int is_ac) {
    int32_t entry = table->look[b->bits >> (64 - LOOK)];
    if (__builtin_expect(!entry, 0))
        entry = look_long(b->bits, table, is_ac);
    skip(b, entry);
    return entry;
}

/* What a block holds. */
enum { DAMAGED, ONLY_DC, ANY };

/* Reads the next block into `block`, which is all 0. */
static inline __attribute__((always_inline)) int read_block(Bits *bits, const Huffman *dc, const Huffman *ac,
                                                            int *predicted, int16_t *block) {
    Bits b = *bits;
    refill(&b);
    int32_t entry = next(&b, dc, 0);
    *predicted += entry >> 16;
    block[0] = (int16_t)*predicted;
    if (!entry || *predicted != block[0])
        return DAMAGED;
    int position = 1, before;
    do {
        refill(&b);
        entry = ac->pairs[b.bits >> (64 - LOOK)];
        if (__builtin_expect(entry != 0, 1)) {
            b.bits <<= entry & 63;
            b.count -= entry & 63;
            before = position;
            position += entry >> 6 & 31;
            block[NATURAL[position - 1]] = (int8_t)(entry >> 16);
            position += entry >> 11 & 31;
            block[NATURAL[position - 1]] = (int16_t)(entry >> 24);
            if ((entry & ENDS) == ENDS) {
                *bits = b;
                return before == 1 && (entry & ENDS_AT_ONCE) == ENDS_AT_ONCE ? ONLY_DC : ANY;
            }
        } else {
            if (!(entry = next(&b, ac, 1)))
                return DAMAGED;
            position += entry >> 8 & 255;
            block[NATURAL[position - 1]] = (int16_t)(entry >> 16);
        }
    } while (position < PAIRS_UNTIL);
    while (position < 64) {
        refill(&b);
        if (!(entry = next(&b, ac, 1)))
            return DAMAGED;
        position += entry >> 8 & 255;
        block[NATURAL[position - 1]] = (int16_t)(entry >> 16);
    }
    *bits = b;
    return position == 64 || position >= END_OF_BLOCK ? ANY : DAMAGED;
}

/* ---- Inverse DCT ---- */

/* Unsigned, so that sums of coefficients that no encoder writes wrap around: they are detected only later. */
typedef uint32_t V8 __attribute__((vector_size(32)));
typedef int32_t Signed8 __attribute__((vector_size(32)));

static inline __attribute__((always_inline)) void clear(Block *block) { /* not memset: GCC turns it into a slow loop */
    for (int i = 0; i < 4; i++)
        _mm256_store_si256((__m256i *)block->at + i, _mm256_setzero_si256());
}

static inline __attribute__((always_inline)) void transpose(V8 *r) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) { /* pairs, then fours, then halves */
        a[2 * i] = _mm256_unpacklo_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = (V8)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        r[4 + i] = (V8)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
}

#define FIX(x) ((uint32_t)((x) * 8192 + 0.5))

/* One dimension, on eight columns at once. Results are 2^13 * sqrt(8) times those of the formula, before `shift`; then
 * `add` is added. */
static inline __attribute__((always_inline)) void idct_1d(V8 *r, int shift, int add) {
    const uint32_t round = (1u << (shift - 1)) + ((uint32_t)add << shift);
    /* Even part: the rotation by 3 pi / 8 of inputs 2 and 6, and the butterflies of 0 and 4. */
    V8 z = (r[2] + r[6]) * FIX(0.541196100);
    V8 e2 = z - r[6] * FIX(1.847759065), e3 = z + r[2] * FIX(0.765366865);
    V8 e0 = ((r[0] + r[4]) << 13) + round, e1 = ((r[0] - r[4]) << 13) + round;
    V8 s0 = e0 + e3, s3 = e0 - e3, s1 = e1 + e2, s2 = e1 - e2;
    /* Odd part: inputs 7, 5, 3, 1. */
    V8 z1 = r[7] + r[1], z2 = r[5] + r[3], z3 = r[7] + r[3], z4 = r[5] + r[1];
    V8 z5 = (z3 + z4) * FIX(1.175875602);
    z1 *= -FIX(0.899976223);
    z2 *= -FIX(2.562915447);
    z3 = z5 - z3 * FIX(1.961570560);
    z4 = z5 - z4 * FIX(0.390180644);
    V8 o0 = r[7] * FIX(0.298631336) + z1 + z3, o1 = r[5] * FIX(2.053119869) + z2 + z4;
    V8 o2 = r[3] * FIX(3.072711026) + z2 + z3, o3 = r[1] * FIX(1.501321110) + z1 + z4;
    r[0] = (V8)((Signed8)(s0 + o3) >> shift);
    r[7] = (V8)((Signed8)(s0 - o3) >> shift);
    r[1] = (V8)((Signed8)(s1 + o2) >> shift);
    r[6] = (V8)((Signed8)(s1 - o2) >> shift);
    r[2] = (V8)((Signed8)(s2 + o1) >> shift);
    r[5] = (V8)((Signed8)(s2 - o1) >> shift);
    r[3] = (V8)((Signed8)(s3 + o0) >> shift);
    r[4] = (V8)((Signed8)(s3 - o0) >> shift);
}

/* Absolute values, or one less: those of a row of eight that are above a power of two less 1 show in a bitwise or. */
static inline __attribute__((always_inline)) V8 size_of(V8 x) { return x ^ (V8)((Signed8)x >> 31); }

/* No encoder writes larger values. For those libjpeg-turbo (16 bits) would no longer agree with the 32 bits here. */
enum { MOST = 8191, MOST_BETWEEN = 16383, MOST_FLAT = 4095 };

/* 8 x 8 pixels of a block. Returns whether its coefficients are in bounds; if not, the pixels are invalid. */
static inline __attribute__((always_inline)) int idct(const int16_t *block, const int32_t *quantiser, uint8_t *out,
                                                      int stride) {
    V8 r[8], sizes = {0}, sizes_between = {0};
    for (int i = 0; i < 8; i++) {
        __m128i half = _mm_loadu_si128((const __m128i *)(block + 8 * i));
        r[i] = (V8)_mm256_cvtepi16_epi32(half) * (V8)_mm256_loadu_si256((const __m256i *)(quantiser + 8 * i));
        sizes |= size_of(r[i]);
    }
    idct_1d(r, 11, 0); /* two bits more than the precision of pixels remain */
    for (int i = 0; i < 8; i++)
        sizes_between |= size_of(r[i]);
    transpose(r);
    idct_1d(r, 18, 128);
    /* r[i] is column i of the pixels: four of a row into each lane, then the eight of a row side by side. */
    const __m256i across = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                            13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i fours[2];
    for (int i = 0; i < 2; i++) {
        __m256i first = _mm256_packs_epi32((__m256i)r[4 * i], (__m256i)r[4 * i + 1]);
        __m256i second = _mm256_packs_epi32((__m256i)r[4 * i + 2], (__m256i)r[4 * i + 3]);
        fours[i] = _mm256_shuffle_epi8(_mm256_packus_epi16(first, second), across);
    }
    __m256i rows[2] = {_mm256_unpacklo_epi32(fours[0], fours[1]), _mm256_unpackhi_epi32(fours[0], fours[1])};
    for (int i = 0; i < 8; i++) { /* rows 0, 1, 4, 5 and 2, 3, 6, 7 */
        const uint8_t *row = (const uint8_t *)&rows[i >> 1 & 1] + 8 * (i & 1) + 16 * (i >> 2);
        memcpy(out + (ptrdiff_t)i * stride, row, 8);
    }
    return _mm256_testz_si256((__m256i)sizes, _mm256_set1_epi32(~MOST)) &
           _mm256_testz_si256((__m256i)sizes_between, _mm256_set1_epi32(~MOST_BETWEEN));
}

/* The same for a block without AC coefficients. */
_Static_assert(4LL * 32768 * 255 + 16 <= INT32_MAX, "any coefficient times any quantiser");
static inline __attribute__((always_inline)) int flat(int dc, uint8_t *out, int stride) {
    int pixel = ((4 * dc + 16) >> 5) + 128;
    pixel = pixel < 0 ? 0 : pixel > 255 ? 255 : pixel;
    for (int i = 0; i < 8; i++)
        memset(out + (ptrdiff_t)i * stride, pixel, 8);
    return dc >= -MOST_FLAT && dc <= MOST_FLAT;
}

/* ---- Headers ---- */

static int word(const uint8_t *p) { return p[0] << 8 | p[1]; }

static int read_quantisers(Decoder *d, const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        int number = *p & 15;
        if (*p >> 4 || number > 3 || end - p < 65) /* 16-bit ones are for 12-bit images */
            return 0;
        for (int i = 0; i < 64; i++)
            d->quantiser[number][ZIGZAG[i]] = p[1 + i];
        d->has_quantiser[number] = 1;
        p += 65;
    }
    return 1;
}

static int read_huffmans(Decoder *d, const uint8_t *p, const uint8_t *end, int *seen) {
    while (p < end) {
        int is_ac = *p >> 4, number = *p & 15, size = 16;
        if (is_ac > 1 || number > 3 || end - p < 17)
            return 0;
        for (int i = 0; i < 16; i++)
            size += p[1 + i];
        if (size > 16 + 256 || end - p < 1 + size)
            return 0;
        if (!read_huffman(is_ac ? &d->ac[number] : &d->dc[number], p + 1, size, is_ac))
            return 0;
        *seen |= 1 << (4 * is_ac + number);
        p += 1 + size;
    }
    return 1;
}

static int read_frame(Decoder *d, const uint8_t *p, int size) {
    if (size < 6 || p[0] != 8 || d->ncomponents)
        return 0;
    d->height = word(p + 1);
    d->width = word(p + 3);
    int n = p[5];
    /* Smaller images are upsampled differently at their edges. */
    if (d->height < 16 || d->width < 16 || (n != 1 && n != 3) || size != 6 + 3 * n)
        return 0;
    for (int i = 0; i < n; i++) {
        Component *c = &d->component[i];
        const uint8_t *about = p + 6 + 3 * i;
        if (about[0] != i + 1) /* others may mean other colours */
            return 0;
        c->h = about[1] >> 4;
        c->v = about[1] & 15;
        c->quantiser = about[2];
        if (c->quantiser > 3 || !c->h || !c->v || c->h > 2 || c->v > c->h)
            return 0;
        if (i ? c->h != 1 || c->v != 1 : n == 1 && c->h != 1)
            return 0;
    }
    d->ncomponents = n;
    return 1;
}

static int read_scan(Decoder *d, const uint8_t *p, int size, int huffmans) {
    int n = d->ncomponents;
    if (!n || size != 4 + 2 * n || p[0] != n || p[1 + 2 * n] != 0 || p[2 + 2 * n] != 63 || p[3 + 2 * n] != 0)
        return 0;
    for (int i = 0; i < n; i++) {
        Component *c = &d->component[i];
        c->dc = p[2 + 2 * i] >> 4;
        c->ac = p[2 + 2 * i] & 15;
        if (p[1 + 2 * i] != i + 1 || c->dc > 3 || c->ac > 3 || !(huffmans >> c->dc & huffmans >> (4 + c->ac) & 1) ||
            !d->has_quantiser[c->quantiser])
            return 0;
    }
    return 1;
}

/* Reads the headers. Returns where the entropy-coded data begin, or NULL. */
static const uint8_t *read_headers(Decoder *d, const uint8_t *p, const uint8_t *end) {
    int huffmans = 0;
    d->ncomponents = 0;
    memset(d->has_quantiser, 0, sizeof d->has_quantiser);
    if (end - p < 4 || p[0] != 0xFF || p[1] != 0xD8)
        return NULL;
    for (p += 2; end - p >= 4 && p[0] == 0xFF;) {
        int marker = p[1], size = word(p + 2) - 2;
        p += 4;
        if (size < 0 || end - p < size)
            return NULL;
        if (marker == 0xDB ? !read_quantisers(d, p, p + size)
            : marker == 0xC4 ? !read_huffmans(d, p, p + size, &huffmans)
            : marker == 0xC0 ? !read_frame(d, p, size)
            : marker == 0xE0 ? size >= 5 && !memcmp(p, "JFIF", 5) && (size < 14 || p[5] != 1)
            : marker == 0xEE ? size >= 5 && !memcmp(p, "Adobe", 5) && (size < 12 || p[11] != 1 || d->ncomponents == 1)
                             : marker != 0xDA && marker != 0xFE && (marker & 0xF0) != 0xE0)
            return NULL;
        if (marker == 0xDA)
            return read_scan(d, p, size, huffmans) ? p + size : NULL;
        p += size;
    }
    return NULL;
}

/* Copies the entropy-coded data without the zero bytes stuffed after 0xFF. Returns its size, or -1 if anything but the
 * end of the image follows. */
static ptrdiff_t unstuff(const uint8_t *p, const uint8_t *end, uint8_t *out) {
    uint8_t *begin = out;
    for (;;) {
        const uint8_t *marker = memchr(p, 0xFF, (size_t)(end - p));
        if (!marker || end - marker < 2)
            return -1;
        memcpy(out, p, (size_t)(marker - p));
        out += marker - p;
        if (marker[1] != 0) {
            memset(out, 0, BEHIND_DATA);
            return marker[1] == 0xD9 ? out - begin : -1;
        }
        *out++ = 0xFF;
        p = marker + 2;
    }
}

/* ---- Pixels ---- */

/* A row of chroma at full width: columns first .. first + count - 1 of the plane, twice as many pixels. `near` is the
 * row that holds the pixels, `far` the next nearest: T.871's centred samples, weighted 3 : 1 in both directions. */
_Static_assert(4 * (3 * 255 + 255) + 8 <= INT16_MAX, "weighted sums of 16 samples fit");
static void upsample_2x2(const uint8_t *near, const uint8_t *far, int columns, int first, int count, int16_t *sums,
                         uint8_t *out) {
    /* sums[1 + i] is that of column first + i; the edges are repeated. */
    int begin = first ? first - 1 : 0, stop = first + count < columns ? first + count + 1 : columns;
    int16_t *sum = sums + 1 - first;
    for (int i = begin; i < stop; i++)
        sum[i] = (int16_t)(3 * near[i] + far[i]);
    if (first == 0)
        sum[-1] = sum[0];
    if (first + count == columns)
        sum[columns] = sum[columns - 1];
    for (int i = 0; i < count; i++) {
        out[2 * i] = (uint8_t)((3 * sums[1 + i] + sums[i] + 8) >> 4);
        out[2 * i + 1] = (uint8_t)((3 * sums[1 + i] + sums[2 + i] + 7) >> 4);
    }
}

static void upsample_2x1(const uint8_t *in, int columns, int first, int count, int16_t *sums, uint8_t *out) {
    int begin = first ? first - 1 : 0, stop = first + count < columns ? first + count + 1 : columns;
    int16_t *sum = sums + 1 - first;
    for (int i = begin; i < stop; i++)
        sum[i] = in[i];
    if (first == 0)
        sum[-1] = sum[0];
    if (first + count == columns)
        sum[columns] = sum[columns - 1];
    for (int i = 0; i < count; i++) {
        out[2 * i] = (uint8_t)((3 * sums[1 + i] + sums[i] + 1) >> 2);
        out[2 * i + 1] = (uint8_t)((3 * sums[1 + i] + sums[2 + i] + 2) >> 2);
    }
}

static inline uint8_t clamp(int x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

/* T.871: R = Y + 1.402 Cr, G = Y - 0.344 Cb - 0.714 Cr, B = Y + 1.772 Cb, in 16 fractional bits, rounded. */
static void to_rgb(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int count, uint8_t *out) {
    int i = 0;
    /* 16 pixels at a time in 16 bits; compiled from the loop below they take four times as long. x * 2 * f / 2^16, plus
     * 1, halved, is x * f / 2^16 rounded; factors beyond 16 bits are what is left of them beside whole numbers. */
    const __m256i centre = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1), half = _mm256_set1_epi32(32768);
    const __m256i red = _mm256_set1_epi16(91881 - 65536), blue = _mm256_set1_epi16((short)(116130 - 131072));
    const __m256i green = _mm256_set1_epi32((65536 - 46802) << 16 | (-22554 & 0xFFFF));
    const __m128i spread = _mm_setr_epi8(0, 8, -1, 1, 9, -1, 2, 10, -1, 3, 11, -1, 4, 12, -1, 5);
    const __m128i spread2 = _mm_setr_epi8(13, -1, 6, 14, -1, 7, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i third = _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1);
    const __m128i third2 = _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    for (; i + 16 <= count; i += 16) {
        __m256i l = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(y + i)));
        __m256i b = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cb + i))), centre);
        __m256i r = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cr + i))), centre);
        __m256i b2 = _mm256_add_epi16(b, b), r2 = _mm256_add_epi16(r, r);
        __m256i rounded = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(r2, red), one), 1);
        __m256i reds = _mm256_add_epi16(_mm256_add_epi16(l, r), rounded);
        rounded = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(b2, blue), one), 1);
        __m256i blues = _mm256_add_epi16(_mm256_add_epi16(l, b2), rounded);
        __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(b, r), green);
        __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(b, r), green);
        low = _mm256_srai_epi32(_mm256_add_epi32(low, half), 16);
        high = _mm256_srai_epi32(_mm256_add_epi32(high, half), 16);
        __m256i greens = _mm256_add_epi16(_mm256_sub_epi16(l, r), _mm256_packs_epi32(low, high));
        /* In each half: 8 reds and 8 greens; 8 blues. */
        __m256i rg = _mm256_packus_epi16(reds, greens), bb = _mm256_packus_epi16(blues, blues);
        for (int k = 0; k < 2; k++) {
            __m128i two = k ? _mm256_extracti128_si256(rg, 1) : _mm256_castsi256_si128(rg);
            __m128i last = k ? _mm256_extracti128_si256(bb, 1) : _mm256_castsi256_si128(bb);
            uint8_t *to = out + 3 * i + 24 * k;
            _mm_storeu_si128((__m128i *)to, _mm_or_si128(_mm_shuffle_epi8(two, spread), _mm_shuffle_epi8(last, third)));
            _mm_storel_epi64((__m128i *)(to + 16),
                             _mm_or_si128(_mm_shuffle_epi8(two, spread2), _mm_shuffle_epi8(last, third2)));
        }
    }
    for (; i < count; i++) {
        int b = cb[i] - 128, r = cr[i] - 128;
        out[3 * i] = clamp(y[i] + ((91881 * r + 32768) >> 16));
        out[3 * i + 1] = clamp(y[i] + ((-22554 * b - 46802 * r + 32768) >> 16));
        out[3 * i + 2] = clamp(y[i] + ((116130 * b + 32768) >> 16));
    }
}

static void grey_to_rgb(const uint8_t *restrict y, int count, uint8_t *restrict out) {
    for (int i = 0; i < count; i++)
        out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = y[i];
}

static int round_up(int x, int to) { return (x + to - 1) / to * to; }

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

/* ---- The whole image ---- */

/* Allocates memory for an image whose file has `size` bytes, and sets where its parts begin. */
static int make_room(Decoder *d, size_t size, int mcu_columns, int mcu_rows, uint8_t **stuffed, uint8_t **rows) {
    size_t need = size + BEHIND_DATA;
    for (int i = 0; i < d->ncomponents; i++) {
        Component *c = &d->component[i];
        c->stride = mcu_columns * 8 * c->h + BEHIND_ROW;
        need += (size_t)c->stride * (size_t)(mcu_rows * 8 * c->v);
    }
    size_t row = (size_t)round_up(d->width, 16) + 2 * BEHIND_ROW;
    need += 4 * row;
    if (need > d->memory_size) {
        free(d->memory);
        d->memory_size = 0;
        if (!(d->memory = malloc(need)))
            return 0;
        d->memory_size = need;
    }
    uint8_t *at = d->memory;
    *rows = at; /* first: they hold 16-bit numbers */
    at += 4 * row;
    for (int i = 0; i < d->ncomponents; i++) {
        Component *c = &d->component[i];
        c->plane = at;
        at += (size_t)c->stride * (size_t)(mcu_rows * 8 * c->v);
    }
    *stuffed = at;
    return 1;
}

/* Inverse DCT of the blocks that touch rows top .. bottom - 1 and columns left .. right - 1 of the image. */
_Static_assert(8 + 6 * 64 * SYMBOL_BITS / 8 + 2 * 8 <= BEHIND_DATA, "an MCU that begins after the end, and two words");
static int read_planes(Decoder *d, const uint8_t *data, ptrdiff_t size, int mcu_columns, int mcu_rows, int top,
                       int bottom, int left, int right) {
    Block blocks[6]; /* of one MCU; transformed only after all are read, when the writes to them have completed */
    int kind[6];
    Bits bits = {data, 0, 0};
    int predicted[3] = {0, 0, 0};
    int h = d->component[0].h, v = d->component[0].v;
    memset(blocks, 0, sizeof blocks);
    for (int row = 0; row < mcu_rows; row++) {
        for (int column = 0; column < mcu_columns; column++) {
            int n = 0;
            for (int i = 0; i < d->ncomponents; i++) {
                Component *c = &d->component[i];
                const Huffman *dc = &d->dc[c->dc], *ac = &d->ac[c->ac];
                for (int k = 0; k < c->h * c->v; k++, n++)
                    if (!(kind[n] = read_block(&bits, dc, ac, &predicted[i], blocks[n].at)))
                        return 0;
            }
            if (bits.at > data + size + 8)
                return 0;
            /* Chroma is needed one sample farther than luma: interpolation reads its neighbours. */
            if ((row + 1) * 8 * v > top - v && row * 8 * v < bottom + v && (column + 1) * 8 * h > left - h &&
                column * 8 * h < right + h) {
                n = 0;
                for (int i = 0; i < d->ncomponents; i++) {
                    Component *c = &d->component[i];
                    const int32_t *quantiser = d->quantiser[c->quantiser];
                    for (int y = 0; y < c->v; y++)
                        for (int x = 0; x < c->h; x++, n++) {
                            uint8_t *out = c->plane + (ptrdiff_t)((row * c->v + y) * 8) * c->stride +
                                           (column * c->h + x) * 8;
                            if (!(kind[n] == ONLY_DC ? flat(blocks[n].at[0] * quantiser[0], out, c->stride)
                                                     : idct(blocks[n].at, quantiser, out, c->stride)))
                                return 0;
                        }
                }
            }
            for (int i = 0; i < n; i++)
                clear(&blocks[i]);
        }
    }
    /* All bits of all bytes must have been used, except the padding of the last byte. */
    ptrdiff_t left_over = 8 * (data + size - bits.at) + bits.count;
    return left_over >= 0 && left_over < 8;
}

static void write_rows(const Decoder *d, uint8_t *rows, int top, int left, int height, int width, uint8_t *out,
                       ptrdiff_t stride) {
    const Component *y = &d->component[0], *cb = &d->component[1], *cr = &d->component[2];
    ptrdiff_t row_size = round_up(d->width, 16) + 2 * BEHIND_ROW;
    int16_t *sums = (int16_t *)rows; /* two rows of bytes */
    uint8_t *chroma[2] = {rows + 2 * row_size, rows + 3 * row_size};
    for (int i = 0; i < height; i++, out += stride) {
        int at = top + i;
        const uint8_t *luma = y->plane + (ptrdiff_t)at * y->stride + left;
        if (d->ncomponents == 1) {
            grey_to_rgb(luma, width, out);
        } else if (y->h == 1) {
            ptrdiff_t offset = (ptrdiff_t)at * cb->stride + left;
            to_rgb(luma, cb->plane + offset, cr->plane + offset, width, out);
        } else {
            int first = left / 2, count = (left + width - 1) / 2 - first + 1;
            for (int k = 0; k < 2; k++) {
                const Component *c = k ? cr : cb;
                if (y->v == 1) {
                    upsample_2x1(c->plane + (ptrdiff_t)at * c->stride, c->columns, first, count, sums, chroma[k]);
                } else {
                    int near = at / 2, far = max(0, min(at % 2 ? near + 1 : near - 1, c->rows - 1));
                    upsample_2x2(c->plane + (ptrdiff_t)near * c->stride, c->plane + (ptrdiff_t)far * c->stride,
                                 c->columns, first, count, sums, chroma[k]);
                }
            }
            to_rgb(luma, chroma[0] + left % 2, chroma[1] + left % 2, width, out);
        }
    }
}

Decoder *jpeg_new(void) { return calloc(1, sizeof(Decoder)); }

void jpeg_free(Decoder *d) {
    if (d)
        free(d->memory);
    free(d);
}

/* Writes rows top .. top + height - 1, columns left .. left + width - 1 of a JPEG to `out`, RGB, `stride` bytes per
 * row. Returns REFUSED unless the file is a sound baseline JPEG of full_height x full_width pixels. */
int jpeg_crop(Decoder *d, const uint8_t *data, size_t size, int full_height, int full_width, int top, int left,
              int height, int width, uint8_t *out, ptrdiff_t stride) {
    uint8_t *plain, *rows;
    const uint8_t *end = data + size, *coded = read_headers(d, data, end);
    if (!coded || d->height != full_height || d->width != full_width || top < 0 || left < 0 || height < 1 ||
        width < 1 || top > d->height - height || left > d->width - width)
        return REFUSED;
    int h = d->component[0].h, v = d->component[0].v;
    int mcu_columns = (d->width + 8 * h - 1) / (8 * h), mcu_rows = (d->height + 8 * v - 1) / (8 * v);
    for (int i = 0; i < d->ncomponents; i++) {
        Component *c = &d->component[i];
        c->columns = (d->width * c->h + h - 1) / h;
        c->rows = (d->height * c->v + v - 1) / v;
    }
    if (!make_room(d, (size_t)(end - coded), mcu_columns, mcu_rows, &plain, &rows))
        return REFUSED;
    ptrdiff_t plain_size = unstuff(coded, end, plain);
    if (plain_size < 0 ||
        !read_planes(d, plain, plain_size, mcu_columns, mcu_rows, top, top + height, left, left + width))
        return REFUSED;
    write_rows(d, rows, top, left, height, width, out, stride);
    return DONE;
}
