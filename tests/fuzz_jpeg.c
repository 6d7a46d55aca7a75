/* Mutates JPEG files and decodes them with shards/read/jpeg.c, to be compiled with -fsanitize=address,undefined.
 *
 *     fuzz SEED SECONDS OUT FILE...
 *
 * Files and pixels lie in blocks of their own size, so that a byte read or written outside of them is found. Prints how
 * many were tried. OUT gets those that were accepted, up to MOST_ACCEPTED: seven int32 (size of the file, top, left,
 * height, width of the part, height, width of the image), the file, the pixels of the part.
 */
#include "../shards/read/jpeg.c"

#include <stdio.h>
#include <time.h>

enum { MOST_ACCEPTED = 3000, MOST_PIXELS = 1 << 20, MOST_BYTES = 1 << 20 };

static uint64_t state;

static uint32_t below(uint32_t n) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull >> 32) % (n ? n : 1));
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One change of `size` bytes, with room for 64 more; the new size. Half of the changes are in the headers. */
static size_t mutate(uint8_t *data, size_t size, const uint8_t *other, size_t other_size) {
    static const uint8_t telling[] = {0, 1, 2, 0x11, 0x22, 0x7F, 0x80, 0xC0, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xFF};
    if (size < 4)
        return size;
    size_t at = below(2) && size > 700 ? below(700) : below((uint32_t)size), n = 1 + below(64);
    switch (below(7)) {
    case 0:
    case 1:
        data[at] ^= (uint8_t)(1 << below(8));
        return size;
    case 2:
        data[at] = telling[below(sizeof telling)];
        return size;
    case 3: /* insert */
        memmove(data + at + 1, data + at, size - at);
        data[at] = (uint8_t)below(256);
        return size + 1;
    case 4: /* delete */
        n = n < size - at ? n : size - at;
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    case 5: /* end early */
        return below(4) ? size : at;
    default: /* a piece of another file */
        n = n < size - at ? n : size - at;
        n = n < other_size ? n : other_size;
        memcpy(data + at, other + below((uint32_t)(other_size - n + 1)), n);
        return size;
    }
}

int main(int argc, char **argv) {
    int files = argc - 4, tried = 0, accepted = 0;
    if (files < 1)
        return 2;
    uint8_t **data = calloc((size_t)files, sizeof *data), *work = malloc(MOST_BYTES + 64);
    size_t *sizes = calloc((size_t)files, sizeof *sizes);
    for (int i = 0; i < files; i++) {
        FILE *file = fopen(argv[4 + i], "rb");
        sizes[i] = file ? fread(work, 1, MOST_BYTES / 2, file) : 0;
        if (!sizes[i])
            return 2;
        memcpy(data[i] = malloc(sizes[i]), work, sizes[i]);
        fclose(file);
    }
    FILE *out = fopen(argv[3], "wb");
    Decoder *decoder = jpeg_new(), *peek = jpeg_new();
    state = strtoull(argv[1], NULL, 10) * 0x9E3779B97F4A7C15ull + 1;
    for (double end = now() + atof(argv[2]); out && now() < end; tried++) {
        int from = (int)below((uint32_t)files), other = (int)below((uint32_t)files);
        size_t size = sizes[from];
        memcpy(work, data[from], size);
        for (uint32_t i = 1 + below(3); i; i--)
            size = mutate(work, size, data[other], sizes[other]);
        uint8_t *exact = malloc(size ? size : 1);
        memcpy(exact, work, size);
        /* A size that the file itself has, so that more than the headers is decoded. */
        int known = read_headers(peek, exact, exact + size) != NULL;
        int32_t height = known ? peek->height : 64, width = known ? peek->width : 64;
        if ((int64_t)height * width <= MOST_PIXELS && height && width) {
            int32_t top = (int32_t)below((uint32_t)height), left = (int32_t)below((uint32_t)width);
            int32_t rows = 1 + (int32_t)below((uint32_t)(height - top));
            int32_t columns = 1 + (int32_t)below((uint32_t)(width - left));
            size_t bytes = (size_t)rows * (size_t)columns * 3;
            uint8_t *pixels = malloc(bytes);
            if (jpeg_crop(decoder, exact, size, height, width, top, left, rows, columns, pixels, 3 * columns) == DONE &&
                accepted++ < MOST_ACCEPTED) {
                int32_t about[7] = {(int32_t)size, top, left, rows, columns, height, width};
                fwrite(about, sizeof about, 1, out);
                fwrite(exact, 1, size, out);
                fwrite(pixels, 1, bytes, out);
            }
            free(pixels);
        }
        free(exact);
    }
    printf("%d\n", tried);
    for (int i = 0; i < files; i++)
        free(data[i]);
    free(data), free(sizes), free(work);
    jpeg_free(decoder), jpeg_free(peek);
    return out && !fclose(out) ? 0 : 2;
}
