/*
 * tiny - a guest without an operating system that checks itself: a hundred of them fit where one Linux is slow.
 *
 * All of its memory is stamped: each page holds {index, sequence, nonce, checksum over the whole page}, the sequence expected is
 * kept in a table in other memory, so that a page that arrives stale is found although its own checksum is good. Pages are
 * rewritten at a set rate and verified round and round; in between the processor halts.
 *
 * On COM1, every `tick` ms, one line:
 *   tick=12 nonce=5f0c... pages=3801 bad=0 written=1280 verified=640 passes=0 checks=0
 * The nonce is made at boot and is in RAM only: it tells a guest that lived on from one that was booted again. Ticks count up by
 * one for ever: a number that comes twice under one nonce is a guest that ran twice. A non-maskable interrupt (QMP inject-nmi)
 * makes it verify all of its memory at once: checks counts up in the line that follows. The first pages that are bad are named.
 *
 * Words of the command line (bytes may end in K or M):
 *   rate=0      bytes of pages rewritten a second: one line of 64 bytes in each page
 *   set=ALL     bytes of memory that are rewritten, from the first page on
 *   verify=256K bytes verified a second
 *   hz=10       wakes a second, 1 to 1000
 *   tick=500    ms between lines
 *   body=mixed  random | text (compressible) | mixed: every other page
 *   beat        a byte on COM2 at every wake: for one who looks from outside how long it stood still
 *
 * Needs a local APIC whose timer runs at 1 GHz, as QEMU's does, and 8 MB. Loaded by `qemu -kernel` (multiboot, 32 bits).
 */
#include <stdbool.h>
#include <stdint.h>

#define PAGE_WORDS 1024u
#define LINE_WORDS 16u
#define MEMORY_MAX 0x40000000u
#define APIC 0xfee00000u
#define APIC_HZ 1000000000u
#define COM1 0x3f8
#define COM2 0x2f8
#define NAMED_BAD 8u
#define VECTOR_WAKE 0x20u
#define VECTOR_SPURIOUS 0x2fu
#define VECTORS 0x30u

enum { W_INDEX, W_SEQUENCE, W_NONCE_LOW, W_NONCE_HIGH, W_CHECKSUM, W_BODY };
enum body { BODY_MIXED, BODY_RANDOM, BODY_TEXT };

struct multiboot { uint32_t flags, low_kb, upper_kb, boot_device, cmdline; };

extern char end[];
extern void wake_entry(void), nmi_entry(void), trap_entry(void);
void tiny_main(uint32_t magic, const struct multiboot *info) __attribute__((noreturn));
void trapped(void) __attribute__((noreturn));

volatile uint32_t wakes, nmis; /* counted by the interrupts */

static uint32_t nonce[2], *sequences, *pages, page_count;
static enum body body;
static uint32_t bad, written, verified, passes, checks;

/* ---- the machine */

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint32_t clock_low(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return low ^ (high << 16);
}

static inline void apic(uint32_t reg, uint32_t value)
{
    *(volatile uint32_t *)(APIC + reg) = value;
}

static void put(uint16_t port, char c)
{
    while (!(in8(port + 5) & 0x20)) {
    }
    out8(port, (uint8_t)c);
}

static void say(const char *text)
{
    for (; *text; text++) {
        put(COM1, *text);
    }
}

static void say_number(const char *name, uint32_t n)
{
    char digits[11], *p = digits + sizeof(digits) - 1;

    *p = 0;
    do {
        *--p = (char)('0' + n % 10);
        n /= 10;
    } while (n);
    say(name);
    say(p);
}

static void say_nonce(void)
{
    say(" nonce=");
    for (int shift = 60; shift >= 0; shift -= 4) {
        put(COM1, "0123456789abcdef"[(nonce[shift / 32] >> (shift % 32)) & 15]);
    }
}

static void halt(void)
{
    for (;;) {
        __asm__ volatile("cli; hlt");
    }
}

void trapped(void)
{
    say("trapped\n");
    halt();
    __builtin_unreachable();
}

static void interrupts_on(uint32_t hz)
{
    static uint32_t idt[VECTORS][2];
    static struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer = {sizeof(idt) - 1, 0};

    for (uint32_t i = 0; i < VECTORS; i++) {
        uint32_t entry = (uint32_t)(i == VECTOR_WAKE ? wake_entry : i == 2 ? nmi_entry : trap_entry);

        idt[i][0] = (8u << 16) | (entry & 0xffff);
        idt[i][1] = (entry & 0xffff0000) | 0x8e00;
    }
    pointer.base = (uint32_t)idt;
    __asm__ volatile("lidt %0" : : "m"(pointer));
    out8(0x21, 0xff); /* nothing from the old interrupt controllers, */
    out8(0xa1, 0xff);
    out8(0x43, 0x30); /* and the old timer runs out once: ticking unheard costs the host, too */
    out8(0x40, 1);
    out8(0x40, 0);
    apic(0xf0, 0x100 | VECTOR_SPURIOUS);
    apic(0x350, 0x10000); /* LINT0 off, LINT1 is the NMI */
    apic(0x360, 0x400);
    apic(0x3e0, 0xb); /* undivided, periodic */
    apic(0x320, 0x20000 | VECTOR_WAKE);
    apic(0x380, APIC_HZ / hz);
}

/* Halts until the timer or an NMI has come since the last call; true: the timer. */
static bool sleep(void)
{
    static uint32_t seen;

    __asm__ volatile("cli");
    while (wakes == seen && nmis == checks) {
        __asm__ volatile("sti; hlt; cli"); /* an interrupt between sti and hlt is taken after hlt began */
    }
    bool woken = wakes != seen;
    seen = wakes;
    __asm__ volatile("sti");
    return woken;
}

/* ---- the command line */

/* What follows "KEY=" (or KEY itself) in the line, NULL when it is not there. */
static const char *word(const char *line, const char *key)
{
    for (const char *p = line; *p; p++) {
        const char *a = p, *b = key;

        if (p > line && p[-1] != ' ') {
            continue;
        }
        while (*b && *a == *b) {
            a++, b++;
        }
        if (!*b && (*a == '=' || *a == ' ' || !*a)) {
            return *a == '=' ? a + 1 : a;
        }
    }
    return 0;
}

static uint32_t number(const char *line, const char *key, uint32_t otherwise)
{
    const char *p = word(line, key);
    uint32_t n = 0;

    if (!p || *p < '0' || *p > '9') {
        return otherwise;
    }
    for (; *p >= '0' && *p <= '9'; p++) {
        n = n * 10 + (uint32_t)(*p - '0');
    }
    return *p == 'K' ? n << 10 : *p == 'M' ? n << 20 : n;
}

/* ---- pages */

static uint32_t mix(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* What a word weighs in its page's checksum: odd, so that no change of one word is lost. */
static inline uint32_t weight(uint32_t i)
{
    return 2 * i + 1;
}

static uint32_t checksum(const uint32_t *page)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < PAGE_WORDS; i++) {
        sum += page[i] * weight(i);
    }
    return sum - page[W_CHECKSUM] * weight(W_CHECKSUM);
}

static void fill(uint32_t index)
{
    uint32_t *page = pages + index * PAGE_WORDS, x = mix(nonce[0] ^ mix(index ^ mix(sequences[index]))) | 1;
    bool text = body == BODY_TEXT || (body == BODY_MIXED && (index & 1));

    page[W_INDEX] = index;
    page[W_SEQUENCE] = sequences[index];
    page[W_NONCE_LOW] = nonce[0];
    page[W_NONCE_HIGH] = nonce[1];
    for (uint32_t i = W_BODY; i < PAGE_WORDS; i++) {
        if (!text || i % 8 == 0) {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
        }
        page[i] = x;
    }
    page[W_CHECKSUM] = checksum(page);
}

static void name_bad(uint32_t index, const char *what)
{
    const uint32_t *page = pages + index * PAGE_WORDS;

    if (bad++ >= NAMED_BAD) {
        return;
    }
    say_number("bad page ", index);
    say(what);
    say_number(": has index ", page[W_INDEX]);
    say_number(" sequence ", page[W_SEQUENCE]);
    say_number(" want ", sequences[index]);
    say("\n");
}

/* False: it was bad, is counted and filled anew. */
static bool header_good(uint32_t index)
{
    const uint32_t *page = pages + index * PAGE_WORDS;

    if (page[W_INDEX] == index && page[W_SEQUENCE] == sequences[index] && page[W_NONCE_LOW] == nonce[0] &&
        page[W_NONCE_HIGH] == nonce[1]) {
        return true;
    }
    name_bad(index, page[W_INDEX] == index && page[W_SEQUENCE] < sequences[index] ? " stale" : " header");
    fill(index);
    return false;
}

static void verify(uint32_t index)
{
    const uint32_t *page = pages + index * PAGE_WORDS;

    verified++;
    if (header_good(index) && page[W_CHECKSUM] != checksum(page)) {
        name_bad(index, " checksum");
        fill(index);
    }
}

/* One line of the page, its sequence, and the difference that makes in its checksum. */
static void rewrite(uint32_t index)
{
    uint32_t *page = pages + index * PAGE_WORDS;

    if (!header_good(index)) {
        return;
    }
    uint32_t sequence = ++sequences[index], x = mix(index ^ mix(sequence)) | 1;
    uint32_t first = LINE_WORDS * (1 + x % (PAGE_WORDS / LINE_WORDS - 1)), sum = page[W_CHECKSUM];

    page[W_SEQUENCE] = sequence;
    sum += weight(W_SEQUENCE);
    for (uint32_t i = first; i < first + LINE_WORDS; i++) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        sum += (x - page[i]) * weight(i);
        page[i] = x;
    }
    page[W_CHECKSUM] = sum;
    written++;
}

/* All memory above the program, behind the table of sequences. */
static void take_memory(uint32_t upper_kb)
{
    uint32_t top = upper_kb > MEMORY_MAX >> 10 ? MEMORY_MAX : 0x100000 + (upper_kb << 10);

    sequences = (uint32_t *)end;
    page_count = (top - (uint32_t)end) / (PAGE_WORDS * 4 + 4) - 1;
    pages = (uint32_t *)(((uint32_t)(sequences + page_count) + 4095) & ~4095u);
    for (uint32_t i = 0; i < page_count; i++) {
        sequences[i] = 0;
        fill(i);
    }
}

static void report(uint32_t tick)
{
    say_number("tick=", tick);
    say_nonce();
    say_number(" pages=", page_count);
    say_number(" bad=", bad);
    say_number(" written=", written);
    say_number(" verified=", verified);
    say_number(" passes=", passes);
    say_number(" checks=", checks);
    say("\n");
}

static void make_nonce(const char *line)
{
    for (int i = 0; i < 64; i++) {
        nonce[i & 1] = mix(nonce[i & 1] ^ clock_low() ^ nonce[(i + 1) & 1]);
        out8(0x80, 0); /* takes a while, never the same */
    }
    for (; *line; line++) {
        nonce[1] = mix(nonce[1] ^ (uint8_t)*line);
    }
}

/* n of a second's work, spread over its wakes without losing a remainder. */
struct pace { uint32_t per_second, owed; };

static uint32_t due(struct pace *p, uint32_t hz)
{
    p->owed += p->per_second;
    uint32_t n = p->owed / hz;
    p->owed -= n * hz;
    return n;
}

static void verify_all(void)
{
    uint32_t asked = nmis;

    for (uint32_t i = 0; i < page_count; i++) {
        verify(i);
    }
    checks = asked;
}

static void work(const char *line)
{
    uint32_t hz = number(line, "hz", 10), tick = 0, write_at = 0, verify_at = 0, set = number(line, "set", 0) / 4096;
    struct pace write = {number(line, "rate", 0) / 4096, 0}, check = {number(line, "verify", 256 << 10) / 4096, 0};
    struct pace ticks = {1000, 0}; /* thousandths */
    uint32_t tick_ms = number(line, "tick", 500), passed_ms = 0;
    bool beat = word(line, "beat") != 0;

    hz = hz < 1 ? 1 : hz > 1000 ? 1000 : hz;
    set = set == 0 || set > page_count ? page_count : set;
    interrupts_on(hz);
    report(tick);
    for (;;) {
        bool woken = sleep();

        if (nmis != checks) {
            verify_all();
            report(++tick);
        }
        if (!woken) {
            continue;
        }
        if (beat) {
            put(COM2, 'b');
        }
        for (uint32_t n = due(&write, hz); n > 0; n--) {
            rewrite(write_at);
            write_at = write_at + 1 == set ? 0 : write_at + 1;
        }
        for (uint32_t n = due(&check, hz); n > 0; n--) {
            verify(verify_at);
            verify_at = verify_at + 1 == page_count ? 0 : verify_at + 1;
            passes += verify_at == 0;
        }
        passed_ms += due(&ticks, hz);
        if (passed_ms >= tick_ms) {
            passed_ms -= tick_ms;
            report(++tick);
        }
    }
}

void tiny_main(uint32_t magic, const struct multiboot *info)
{
    static char line[512];

    if (magic == 0x2badb002 && (info->flags & 4)) { /* it may lie in memory that is about to be stamped */
        const char *from = (const char *)info->cmdline;
        for (uint32_t i = 0; i + 1 < sizeof(line) && from[i]; i++) {
            line[i] = from[i];
        }
    }
    const char *kind = word(line, "body");
    body = kind && *kind == 'r' ? BODY_RANDOM : kind && *kind == 't' ? BODY_TEXT : BODY_MIXED;
    make_nonce(line);
    take_memory(info->upper_kb);
    work(line);
    halt();
    __builtin_unreachable();
}
