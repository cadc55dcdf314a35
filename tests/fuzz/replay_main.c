/* Runs one fuzz target over the files given, without a fuzzer, and over every truncation and some damage
 * of each. The same every time. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void feed(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1); /* so that a sanitizer sees a read behind the end */
    if (!exact)
        exit(1);
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

int main(int argc, char **argv)
{
    static uint8_t buf[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f) {
            perror(argv[i]);
            return 1;
        }
        size_t n = fread(buf, 1, sizeof(buf), f);
        fclose(f);
        feed(buf, n);
        size_t head = n < 256 ? n : 256;
        for (size_t cut = 0; cut < head; cut++)
            feed(buf, cut);
        for (size_t bit = 0; bit < head * 8; bit++) {
            buf[bit / 8] ^= (uint8_t)(1u << bit % 8);
            feed(buf, n);
            buf[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    }
    return 0;
}
