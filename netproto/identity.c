/* netproto/identity.c - this host's key, and the way people see keys. */
#include "netproto/netproto_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <sys/stat.h>

static const char PREFIX[] = "lb1";

void lb_key_format(char out[LB_KEY_TEXT_BYTES], const uint8_t pub[LB_KEY_BYTES])
{
    memcpy(out, PREFIX, 3);
    lb_hex(out + 3, pub, LB_KEY_BYTES);
}

int lb_key_parse(const char *text, uint8_t pub[LB_KEY_BYTES], struct lb_error *err)
{
    uint8_t key[LB_KEY_BYTES];

    if (strlen(text) != LB_KEY_TEXT_BYTES - 1 || strncmp(text, PREFIX, 3) != 0 ||
        lb_unhex(key, sizeof(key), text + 3) != LB_KEY_BYTES) {
        lb_fail(err, LB_E_USAGE, "that is not a key: \"lb1\" and 64 hexadecimal digits are needed");
        return lb_remedy(err, "copy it from `lifeboat host id` of the other host");
    }
    memcpy(pub, key, sizeof(key));
    return 0;
}

/* A new key in a file that appears under its name complete, or not at all; when
 * another process was faster, its key stays. */
static int make_key(const char *dir, const char *path, struct lb_error *err)
{
    uint8_t priv[LB_KEY_BYTES];
    char text[2 * LB_KEY_BYTES + 2];
    LB_AUTO_FREE char *tmp = lb_asprintf("%s.%ld.new", path, (long)getpid());
    int rc;

    randombytes_buf(priv, sizeof(priv));
    lb_hex(text, priv, sizeof(priv));
    strcat(text, "\n");
    rc = lb_mkdir_p(dir, 0700, err);
    if (rc == 0)
        rc = lb_file_write_atomic(tmp, text, strlen(text), 0600, err);
    if (rc == 0 && link(tmp, path) < 0 && errno != EEXIST)
        rc = lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot create %s", path);
    unlink(tmp);
    if (rc == 0) {
        LB_AUTO_FD int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0 || fsync(fd) < 0)
            rc = lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot sync %s", dir);
    }
    sodium_memzero(priv, sizeof(priv));
    sodium_memzero(text, sizeof(text));
    return rc;
}

static int load_key(const char *path, struct lb_identity *out, struct lb_error *err)
{
    char *text = NULL;
    size_t len = 0;
    struct stat st;

    if (stat(path, &st) < 0)
        return lb_fail_errno(err, LB_E_NOT_FOUND, errno, "cannot open %s", path);
    if (st.st_mode & 077) {
        lb_fail(err, LB_E_AUTH, "%s can be read by others", path);
        return lb_remedy(err, "chmod 600 %s; if somebody may have read it, remove it, restart the "
                              "daemon and trust the new key on the other hosts", path);
    }
    if (lb_file_read(path, 256, &text, &len, err) < 0)
        return -1;
    text[strcspn(text, "\n")] = 0;
    bool ok = lb_unhex(out->priv, LB_KEY_BYTES, text) == LB_KEY_BYTES &&
              crypto_scalarmult_base(out->pub, out->priv) == 0;
    sodium_memzero(text, len);
    free(text);
    if (ok)
        return 0;
    lb_identity_wipe(out);
    lb_fail(err, LB_E_AUTH, "%s does not hold a key", path);
    return lb_remedy(err, "restore it from a backup, or remove it to get a new key, which the "
                          "other hosts must then trust");
}

int lb_identity_load(const char *state_dir, struct lb_identity *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = lb_asprintf("%s/identity.key", state_dir);

    if (lb_crypto_init(err) < 0)
        return -1;
    if (access(path, F_OK) < 0 && errno == ENOENT && make_key(state_dir, path, err) < 0)
        return -1;
    return load_key(path, out, err);
}

void lb_identity_wipe(struct lb_identity *id)
{
    sodium_memzero(id, sizeof(*id));
}
