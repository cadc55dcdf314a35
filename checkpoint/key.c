/* checkpoint/key.c - keys of encrypted checkpoints; see key.h.
 *
 * All that is secret is in memory of sodium_malloc (locked, guarded by pages that fault, wiped when freed).
 * Keys that Argon2id made are kept with what they were made from: the files of a chain have one salt, so
 * that a chain of any length costs one derivation. */
#include "checkpoint/key.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/store_internal.h"

enum {
    KEY_BYTES = 32,
    MAX_PASSPHRASE = 4096,
    MAX_DERIVED = 8, /* chains of one key at a time */
};
_Static_assert(crypto_aead_xchacha20poly1305_ietf_KEYBYTES == KEY_BYTES, "key");
_Static_assert(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES == sizeof(((struct lb_key_slot *)0)->nonce), "nonce");
_Static_assert(crypto_pwhash_SALTBYTES == sizeof(((struct lb_key_slot *)0)->salt), "salt");

struct derived {
    uint8_t salt[16];
    uint64_t ops_limit, mem_limit;
    uint8_t key[KEY_BYTES];
};

/* Guarded memory */
struct secret {
    pthread_mutex_t lock; /* of what follows it; held while Argon2id works: who asks for the same waits for it */
    unsigned n_derived;   /* made so far; the last MAX_DERIVED are kept, number i in i % MAX_DERIVED */
    struct derived derived[MAX_DERIVED];
    size_t len;           /* constant from here on */
    uint8_t text[MAX_PASSPHRASE]; /* passphrase, or the key file's 32 bytes */
};

struct lb_ckpt_key {
    enum lb_key_kind kind;
    struct secret *secret;
};

static int key_new(enum lb_key_kind kind, const void *text, size_t len, struct lb_ckpt_key **out,
                   struct lb_error *err)
{
    if (sodium_init() < 0) /* 1 when done before */
        return lb_fail(err, LB_E_INTERNAL, "libsodium cannot be initialised");
    struct secret *s = sodium_malloc(sizeof(*s));
    if (!s)
        return lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory for a key");
    sodium_memzero(s, sizeof(*s));
    pthread_mutex_init(&s->lock, NULL);
    memcpy(s->text, text, len);
    s->len = len;
    *out = lb_alloc(sizeof(**out));
    **out = (struct lb_ckpt_key){kind, s};
    return 0;
}

void lb_ckpt_key_free(struct lb_ckpt_key *k)
{
    if (!k)
        return;
    pthread_mutex_destroy(&k->secret->lock);
    sodium_free(k->secret);
    free(k);
}

enum lb_key_kind lb_ckpt_key_kind(const struct lb_ckpt_key *k)
{
    return k ? k->kind : LB_KEY_NONE;
}

/* The file's bytes, at most cap; -1 with *err. */
static ssize_t read_key_file(const char *path, uint8_t *buf, size_t cap, struct lb_error *err)
{
    struct stat st;
    /* not blocking: what is no file (a fifo) is refused below */
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_AUTH, errno, "cannot open key file %s",
                             path);
    if (!S_ISREG(st.st_mode))
        return lb_fail(err, LB_E_USAGE, "key file %s is not a file", path);
    if (st.st_mode & 077) {
        lb_fail(err, LB_E_AUTH, "key file %s can be read by others (mode %04o)", path,
                (unsigned)st.st_mode & 07777);
        return lb_remedy(err, "chmod 600 %s, or a new key if somebody may have read it", path);
    }
    size_t used = 0;
    while (used < cap) {
        ssize_t n = read(fd, buf + used, cap - used);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read key file %s", path);
        if (n == 0)
            break;
        used += (size_t)n;
    }
    return (ssize_t)used;
}

/* 32 bytes, or 64 hex digits and perhaps a newline, to key. */
static bool parse_key(const uint8_t *text, size_t len, uint8_t key[KEY_BYTES])
{
    size_t got = 0;
    const char *end = NULL;

    if (len == KEY_BYTES) {
        memcpy(key, text, KEY_BYTES);
        return true;
    }
    if (len == 2 * KEY_BYTES + 1 && text[len - 1] == '\n')
        len--;
    return len == 2 * KEY_BYTES &&
           sodium_hex2bin(key, KEY_BYTES, (const char *)text, len, NULL, &got, &end) == 0 &&
           got == KEY_BYTES && end == (const char *)text + len;
}

int lb_ckpt_key_file(const char *path, struct lb_ckpt_key **out, struct lb_error *err)
{
    uint8_t text[2 * KEY_BYTES + 2], key[KEY_BYTES]; /* one byte more than any key */
    ssize_t n = read_key_file(path, text, sizeof(text), err);
    int rc = -1;

    if (n >= 0 && parse_key(text, (size_t)n, key))
        rc = key_new(LB_KEY_FILE, key, sizeof(key), out, err);
    else if (n >= 0) {
        lb_fail(err, LB_E_USAGE, "key file %s has neither 32 bytes nor 64 hexadecimal digits", path);
        lb_remedy(err, "make one: (umask 077; head -c 32 /dev/urandom >FILE)");
    }
    sodium_memzero(text, sizeof(text));
    sodium_memzero(key, sizeof(key));
    return rc;
}

int lb_ckpt_key_passphrase(const char *text, size_t len, struct lb_ckpt_key **out, struct lb_error *err)
{
    if (len == 0)
        return lb_fail(err, LB_E_USAGE, "the passphrase is empty");
    if (len > MAX_PASSPHRASE)
        return lb_fail(err, LB_E_USAGE, "the passphrase is longer than %d bytes", MAX_PASSPHRASE);
    return key_new(LB_KEY_PASSPHRASE, text, len, out, err);
}

/* ------------------------------------------------------------------------ deriving */

static unsigned n_kept(const struct secret *s)
{
    return LB_MIN(s->n_derived, (unsigned)MAX_DERIVED);
}

static const struct derived *find(const struct secret *s, const struct lb_key_slot *slot)
{
    for (unsigned i = 0; i < n_kept(s); i++)
        if (!memcmp(s->derived[i].salt, slot->salt, sizeof(slot->salt)) &&
            s->derived[i].ops_limit == slot->ops_limit && s->derived[i].mem_limit == slot->mem_limit)
            return &s->derived[i];
    return NULL;
}

/* The key that wraps, for the slot's salt and limits. Lock held; the result is valid as long. */
static const uint8_t *wrapping_key(struct secret *s, enum lb_key_kind kind, const struct lb_key_slot *slot,
                                   struct lb_error *err)
{
    if (kind == LB_KEY_FILE)
        return s->text;
    const struct derived *known = find(s, slot);
    if (known)
        return known->key;
    struct derived *d = &s->derived[s->n_derived % MAX_DERIVED];
    if (crypto_pwhash(d->key, sizeof(d->key), (const char *)s->text, s->len, slot->salt, slot->ops_limit,
                      (size_t)slot->mem_limit, crypto_pwhash_ALG_ARGON2ID13) < 0) {
        memset(d, 0, sizeof(*d));
        lb_fail_errno(err, LB_E_NO_SPACE, errno, "no memory (%llu MiB) to make a key of the passphrase",
                      (unsigned long long)(slot->mem_limit >> 20));
        return NULL;
    }
    memcpy(d->salt, slot->salt, sizeof(d->salt));
    d->ops_limit = slot->ops_limit;
    d->mem_limit = slot->mem_limit;
    s->n_derived++;
    return d->key;
}

/* Of a new file: the salt last used with our limits, so that one derivation does for the parent and its child. */
static void choose_salt(const struct secret *s, struct lb_key_slot *slot)
{
    slot->ops_limit = crypto_pwhash_OPSLIMIT_INTERACTIVE;
    slot->mem_limit = crypto_pwhash_MEMLIMIT_INTERACTIVE;
    for (unsigned i = s->n_derived, left = n_kept(s); left > 0; i--, left--) {
        const struct derived *d = &s->derived[(i - 1) % MAX_DERIVED];
        if (d->ops_limit == slot->ops_limit && d->mem_limit == slot->mem_limit) {
            memcpy(slot->salt, d->salt, sizeof(slot->salt));
            return;
        }
    }
    randombytes_buf(slot->salt, sizeof(slot->salt));
}

int lb_ckpt_key_new(const struct lb_ckpt_key *k, const void *bind, size_t bind_len, struct lb_key_slot *slot,
                    uint8_t data_key[32], struct lb_error *err)
{
    struct secret *s = k->secret;
    struct lb_key_slot made = {.kind = k->kind};

    pthread_mutex_lock(&s->lock);
    if (k->kind == LB_KEY_PASSPHRASE)
        choose_salt(s, &made);
    const uint8_t *key = wrapping_key(s, k->kind, &made, err);
    if (key) {
        randombytes_buf(data_key, KEY_BYTES);
        randombytes_buf(made.nonce, sizeof(made.nonce));
        crypto_aead_xchacha20poly1305_ietf_encrypt(made.wrapped, NULL, data_key, KEY_BYTES, bind, bind_len, NULL,
                                                   made.nonce, key);
        *slot = made;
    }
    pthread_mutex_unlock(&s->lock);
    return key ? 0 : -1;
}

/* ------------------------------------------------------------------------- opening */

static const char *kind_text(enum lb_key_kind kind)
{
    return kind == LB_KEY_FILE ? "key file" : "passphrase";
}

/* The slot comes from a file that anybody may have written. */
static int check_slot(const struct lb_key_slot *slot, struct lb_error *err)
{
    if (slot->kind != LB_KEY_FILE && slot->kind != LB_KEY_PASSPHRASE)
        return lb_fail(err, LB_E_PROTO, "is encrypted in an unknown way (%u)", (unsigned)slot->kind);
    if (slot->kind == LB_KEY_PASSPHRASE &&
        (slot->ops_limit < crypto_pwhash_OPSLIMIT_MIN || slot->ops_limit > LB_CF_MAX_ARGON_OPS ||
         slot->mem_limit < crypto_pwhash_MEMLIMIT_MIN || slot->mem_limit > LB_CF_MAX_ARGON_BYTES))
        return lb_fail(err, LB_E_PROTO, "asks for %llu passes over %llu bytes to make a key of the passphrase",
                       (unsigned long long)slot->ops_limit, (unsigned long long)slot->mem_limit);
    return 0;
}

static int check_kind(const struct lb_ckpt_key *k, const struct lb_key_slot *slot, struct lb_error *err)
{
    if (k && k->kind == slot->kind)
        return 0;
    if (k)
        lb_fail(err, LB_E_AUTH, "is encrypted with a %s, not with a %s", kind_text(slot->kind), kind_text(k->kind));
    else
        lb_fail(err, LB_E_AUTH, "is encrypted with a %s", kind_text(slot->kind));
    return lb_remedy(err, "give it: %s", slot->kind == LB_KEY_FILE ? "--key FILE" : "--passphrase");
}

int lb_ckpt_key_open(const struct lb_ckpt_key *k, const struct lb_key_slot *slot, const void *bind, size_t bind_len,
                     uint8_t data_key[32], struct lb_error *err)
{
    if (check_slot(slot, err) < 0 || check_kind(k, slot, err) < 0)
        return -1;
    struct secret *s = k->secret;
    int rc = -1;

    pthread_mutex_lock(&s->lock);
    const uint8_t *key = wrapping_key(s, k->kind, slot, err);
    if (key)
        rc = crypto_aead_xchacha20poly1305_ietf_decrypt(data_key, NULL, NULL, slot->wrapped, sizeof(slot->wrapped),
                                                        bind, bind_len, slot->nonce, key);
    pthread_mutex_unlock(&s->lock);
    if (key && rc < 0)
        lb_fail(err, LB_E_AUTH, k->kind == LB_KEY_FILE ? "wrong key" : "wrong passphrase");
    return rc;
}
