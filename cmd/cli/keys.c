/* cmd/cli/keys.c - the key of encrypted checkpoints: a file the daemon reads, or a passphrase. */
#include "cmd/cli/keys.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <termios.h>

enum { OPT_KEY = 2000, OPT_PASSPHRASE, OPT_PASSPHRASE_FILE };
enum { MAX_PASSPHRASE = 1024 };

static error_t parse_key(int key, char *arg, struct argp_state *state)
{
    struct lb_key_args *k = state->input;

    switch (key) {
    case OPT_KEY:
        k->file = arg;
        return 0;
    case OPT_PASSPHRASE:
        k->ask = true;
        return 0;
    case OPT_PASSPHRASE_FILE:
        k->passphrase_file = arg;
        return 0;
    case ARGP_KEY_END:
        if (!!k->file + k->ask + !!k->passphrase_file > 1)
            argp_error(state, "--key, --passphrase and --passphrase-file: one of them");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option key_options[] = {
    {"key", OPT_KEY, "FILE", 0, "Encrypted with this key: 32 bytes, or 64 hex digits", 5},
    {"passphrase", OPT_PASSPHRASE, NULL, 0, "Encrypted with a passphrase, asked for on the terminal", 5},
    {"passphrase-file", OPT_PASSPHRASE_FILE, "FILE", 0, "Encrypted with the passphrase in the first line of a file", 5},
    {0},
};
const struct argp lb_key_argp = {key_options, parse_key, NULL, NULL, NULL, NULL, NULL};

/* One line without echo; its length, or -1. */
static ssize_t ask(int tty, const char *prompt, char *buf, struct lb_error *err)
{
    struct termios was, quiet;
    ssize_t n = 0;
    char c;

    if (tcgetattr(tty, &was) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot use the terminal");
    quiet = was;
    quiet.c_lflag &= ~(tcflag_t)ECHO;
    tcsetattr(tty, TCSAFLUSH, &quiet);
    dprintf(tty, "%s: ", prompt);
    while (read(tty, &c, 1) == 1 && c != '\n')
        if (n < MAX_PASSPHRASE)
            buf[n++] = c;
    tcsetattr(tty, TCSAFLUSH, &was);
    dprintf(tty, "\n");
    return n;
}

static ssize_t ask_twice(bool make, char *buf, struct lb_error *err)
{
    char again[MAX_PASSPHRASE];
    LB_AUTO_FD int tty = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);
    ssize_t n, m;

    if (tty < 0) {
        lb_fail(err, LB_E_USAGE, "there is no terminal to ask for the passphrase");
        return lb_remedy(err, "give --passphrase-file FILE or --key FILE");
    }
    n = ask(tty, "Passphrase", buf, err);
    if (n <= 0 || !make)
        return n;
    m = ask(tty, "The same again", again, err);
    if (m >= 0 && (m != n || memcmp(buf, again, (size_t)n)))
        n = lb_fail(err, LB_E_USAGE, "the two passphrases differ");
    else if (m < 0)
        n = -1;
    sodium_memzero(again, sizeof(again));
    return n;
}

static ssize_t first_line(const char *path, char *buf, struct lb_error *err)
{
    LB_AUTO_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, buf, MAX_PASSPHRASE);
    char *nl;

    if (n < 0)
        return lb_fail_errno(err, errno == ENOENT ? LB_E_NOT_FOUND : LB_E_USAGE, errno, "cannot read the passphrase from %s",
                             path);
    nl = memchr(buf, '\n', (size_t)n);
    return nl ? nl - buf : n;
}

int lb_key_get(const struct lb_key_args *k, bool make, Lb__RpcKey *out, struct lb_error *err)
{
    char buf[MAX_PASSPHRASE];
    ssize_t n;

    if (k->file) {
        /* the daemon has another working directory */
        out->key_file = realpath(k->file, NULL);
        if (!out->key_file)
            return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "cannot find the key file %s", k->file);
        return 0;
    }
    if (!k->ask && !k->passphrase_file)
        return 0;
    n = k->ask ? ask_twice(make, buf, err) : first_line(k->passphrase_file, buf, err);
    if (n == 0)
        n = lb_fail(err, LB_E_USAGE, "the passphrase is empty");
    if (n > 0) {
        out->passphrase.data = lb_alloc((size_t)n);
        out->passphrase.len = (size_t)n;
        memcpy(out->passphrase.data, buf, (size_t)n);
    }
    sodium_memzero(buf, sizeof(buf));
    return n < 0 ? -1 : 0;
}

void lb_key_wipe(Lb__RpcKey *k)
{
    if (k->passphrase.data)
        sodium_memzero(k->passphrase.data, k->passphrase.len);
    free(k->passphrase.data);
    if (k->key_file && k->key_file[0])
        free(k->key_file);
    lb__rpc_key__init(k);
}
