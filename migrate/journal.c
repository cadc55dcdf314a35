/* migrate/journal.c - the hand-over journal as small files.
 *
 * STATE_DIR/handover/TOKEN.json holds one JSON object; every move rewrites it by
 * lb_file_write_atomic, so that a crash leaves the state before or the state
 * after, and a move that returned 0 survives a power cut.
 *
 * The file is the truth.  A move first compares the caller's copy with it: two
 * processes that decide about the same token cannot both win, even when one of
 * them forgot to take TOKEN.lock (the lock closes the window between that look
 * and the rename).  A journal that cannot be read is an error, never "none":
 * "none" lets the other side run its copy. */
#include "migrate/journal.h"
#include "core/json.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

enum {
    JOURNAL_VERSION = 1,
    JOURNAL_MAX_BYTES = 16384,
    LOCK_POLL_MS = 5,
};
#define KEEP_MS (UINT64_C(30) * 24 * 3600 * 1000)
#define KEEP_TMP_MS (UINT64_C(24) * 3600 * 1000)

/* What may follow what; see the table in journal.h.  RUNNING -> REFUSED is not
 * here on purpose: only lb_journal_retract does it. */
static const struct lb_sm_state moves[] = {
    [LB_J_NONE] = {"none", LB_SM_TO(LB_J_PREPARING) | LB_SM_TO(LB_J_PREPARED) |
                               LB_SM_TO(LB_J_REFUSED)},
    [LB_J_PREPARING] = {"preparing", LB_SM_TO(LB_J_HANDED_OVER) | LB_SM_TO(LB_J_ABORTED)},
    [LB_J_HANDED_OVER] = {"handed-over", LB_SM_TO(LB_J_DONE) | LB_SM_TO(LB_J_ABORTED)},
    [LB_J_DONE] = {"done", 0},
    [LB_J_ABORTED] = {"aborted", 0},
    [LB_J_PREPARED] = {"prepared", LB_SM_TO(LB_J_RUNNING) | LB_SM_TO(LB_J_REFUSED)},
    [LB_J_RUNNING] = {"running", 0},
    [LB_J_REFUSED] = {"refused", 0},
};

const char *lb_journal_state_name(enum lb_journal_state s)
{
    return (unsigned)s < LB_ARRAY_LEN(moves) ? moves[s].name : "unknown";
}

static bool may_move(enum lb_journal_state from, enum lb_journal_state to)
{
    struct lb_sm sm;
    lb_sm_init(&sm, "journal", moves, LB_ARRAY_LEN(moves), from);
    return lb_sm_may(&sm, to);
}

/* Tokens come from the peer and become file names. */
static bool token_valid(const char *t)
{
    return strlen(t) == LB_TOKEN_HEX - 1 && strspn(t, "0123456789abcdef") == LB_TOKEN_HEX - 1;
}

static char *token_path(const char *state_dir, const char *token, const char *suffix,
                        struct lb_error *err)
{
    if (!token_valid(token)) {
        lb_fail(err, LB_E_PROTO, "\"%.40s\" is not a hand-over token", token);
        return NULL;
    }
    return lb_asprintf("%s/handover/%s%s", state_dir, token, suffix);
}

static int broken(const char *path, const char *why, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "the hand-over journal %s is damaged: %s", path, why);
    return lb_remedy(err, "find out on which host the VM runs, then remove the file; until then "
                          "nothing is decided from it");
}

static int copy_text(json_t *root, const char *key, char *out, size_t cap)
{
    const char *s = json_string_value(json_object_get(root, key));
    if (!s || strlen(s) >= cap)
        return -1;
    memcpy(out, s, strlen(s) + 1);
    return 0;
}

static int decode(json_t *root, const char *path, const char *token, struct lb_journal *out,
                  struct lb_error *err)
{
    struct lb_journal j = {0};
    char state[32];

    if (json_integer_value(json_object_get(root, "version")) != JOURNAL_VERSION)
        return broken(path, "its version is not known to this program", err);
    if (copy_text(root, "token", j.token, sizeof(j.token)) || strcmp(j.token, token))
        return broken(path, "it names another token", err);
    if (copy_text(root, "state", state, sizeof(state)) || copy_text(root, "vm", j.vm, sizeof(j.vm)) ||
        copy_text(root, "peer", j.peer, sizeof(j.peer)) ||
        (json_object_get(root, "peer_key") &&
         copy_text(root, "peer_key", j.peer_key, sizeof(j.peer_key))) ||
        copy_text(root, "detail", j.detail, sizeof(j.detail)) ||
        !json_is_integer(json_object_get(root, "changed_ms")))
        return broken(path, "a field is missing or too long", err);
    j.changed_ms = (uint64_t)json_integer_value(json_object_get(root, "changed_ms"));
    j.settled = json_is_true(json_object_get(root, "settled"));
    for (unsigned i = LB_J_PREPARING; i < LB_ARRAY_LEN(moves); i++) {
        if (!strcmp(state, moves[i].name)) {
            j.state = i;
            *out = j;
            return 0;
        }
    }
    return broken(path, "its state is not known to this program", err);
}

int lb_journal_load(const char *state_dir, const char *token_hex, struct lb_journal *out,
                    struct lb_error *err)
{
    LB_AUTO_FREE char *path = token_path(state_dir, token_hex, ".json", err);
    LB_AUTO_FREE char *text = NULL;
    size_t len = 0;
    struct lb_error why = LB_ERROR_INIT;

    if (!path)
        return -1;
    if (lb_file_read(path, JOURNAL_MAX_BYTES, &text, &len, &why) < 0) {
        if (why.sys_errno == ENOENT) {
            memset(out, 0, sizeof(*out));
            memcpy(out->token, token_hex, LB_TOKEN_HEX);
            return 0;
        }
        if (why.code == LB_E_PROTO)
            return broken(path, "it is too long", err);
        if (err)
            *err = why;
        return -1;
    }
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
    int rc = json_is_object(root) ? decode(root, path, token_hex, out, err)
                                  : broken(path, "it is not JSON", err);
    json_decref(root);
    return rc;
}

static int store(const char *state_dir, const char *path, const struct lb_journal *j,
                 struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_asprintf("%s/handover", state_dir);
    if (lb_mkdir_p(dir, 0700, err) < 0)
        return -1;
    json_t *root = json_object();
    json_object_set_new(root, "version", json_integer(JOURNAL_VERSION));
    json_object_set_new(root, "token", json_string(j->token));
    json_object_set_new(root, "state", json_string(lb_journal_state_name(j->state)));
    json_object_set_new(root, "vm", lb_json_text(j->vm));
    json_object_set_new(root, "peer", lb_json_text(j->peer));
    if (j->peer_key[0])
        json_object_set_new(root, "peer_key", lb_json_text(j->peer_key));
    if (j->settled)
        json_object_set_new(root, "settled", json_true());
    json_object_set_new(root, "changed_ms", json_integer((json_int_t)j->changed_ms));
    json_object_set_new(root, "detail", lb_json_text(j->detail));
    LB_AUTO_FREE char *text = json_dumps(root, JSON_INDENT(1));
    json_decref(root);
    if (!text)
        return lb_fail(err, LB_E_NO_SPACE, "no memory to write %s", path);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

/* Write `next`, which follows `*j`, and make *j say what the file says. */
static int commit(const char *state_dir, const char *path, struct lb_journal *j,
                  struct lb_journal *next, struct lb_error *err)
{
    next->changed_ms = lb_wall_ms();
    if (store(state_dir, path, next, err) < 0) {
        /* The rename may have happened before the failure (fsync of the directory). */
        struct lb_journal now;
        if (lb_journal_load(state_dir, j->token, &now, NULL) == 0)
            j->state = now.state;
        return lb_context(err, "the hand-over of %s could not be recorded as %s", j->vm,
                          lb_journal_state_name(next->state));
    }
    lb_log(LB_LOG_INFO, "handover token=%s vm=%s peer=%s %s -> %s%s%s", j->token, j->vm, j->peer,
           lb_journal_state_name(j->state), lb_journal_state_name(next->state),
           next->detail[0] ? ": " : "", next->detail);
    *j = *next;
    return 0;
}

/* The caller's copy must be what the file says. */
static int check_current(const char *state_dir, const struct lb_journal *j, struct lb_error *err)
{
    struct lb_journal now;
    if (lb_journal_load(state_dir, j->token, &now, err) < 0)
        return -1;
    if (now.state == j->state)
        return 0;
    lb_fail(err, LB_E_STATE, "the hand-over of %s is already %s, not %s", j->vm,
            lb_journal_state_name(now.state), lb_journal_state_name(j->state));
    return lb_remedy(err, "another process decided: `lifeboat recover %s` shows what is true", j->vm);
}

int lb_journal_move(const char *state_dir, struct lb_journal *j, enum lb_journal_state to,
                    struct lb_error *err)
{
    LB_AUTO_FREE char *path = token_path(state_dir, j->token, ".json", err);
    if (!path || check_current(state_dir, j, err) < 0)
        return -1;
    if (!may_move(j->state, to))
        return lb_fail(err, LB_E_STATE, "the hand-over of %s is %s and cannot become %s", j->vm,
                       lb_journal_state_name(j->state), lb_journal_state_name(to));
    struct lb_journal next = *j;
    next.state = to;
    return commit(state_dir, path, j, &next, err);
}

int lb_journal_retract(const char *state_dir, struct lb_journal *j, const char *reason,
                       struct lb_error *err)
{
    assert(reason && *reason);
    LB_AUTO_FREE char *path = token_path(state_dir, j->token, ".json", err);
    if (!path || check_current(state_dir, j, err) < 0)
        return -1;
    if (j->state != LB_J_RUNNING)
        return lb_fail(err, LB_E_STATE, "the hand-over of %s is %s: there is nothing to retract",
                       j->vm, lb_journal_state_name(j->state));
    struct lb_journal next = *j;
    next.state = LB_J_REFUSED;
    snprintf(next.detail, sizeof(next.detail), "retracted: %s", reason);
    return commit(state_dir, path, j, &next, err);
}

int lb_journal_settle(const char *state_dir, struct lb_journal *j, struct lb_error *err)
{
    LB_AUTO_FREE char *path = token_path(state_dir, j->token, ".json", err);
    if (!path || check_current(state_dir, j, err) < 0)
        return -1;
    if (j->state != LB_J_RUNNING)
        return lb_fail(err, LB_E_STATE, "the hand-over of %s is %s: it cannot be settled", j->vm,
                       lb_journal_state_name(j->state));
    struct lb_journal next = *j;
    next.settled = true;
    return commit(state_dir, path, j, &next, err);
}

/* -------------------------------------------------------------------- lock */

/* 1 locked, 0 held by somebody, -1 error. The file may be pruned between open
 * and flock: then the lock is on a name that is gone, and is taken anew. */
static int try_lock(const char *path, int *out, struct lb_error *err)
{
    for (;;) {
        LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot open %s", path);
        if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EWOULDBLOCK)
                return 0;
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot lock %s", path);
        }
        struct stat mine, named;
        if (fstat(fd, &mine) == 0 && stat(path, &named) == 0 && mine.st_ino == named.st_ino &&
            mine.st_dev == named.st_dev) {
            *out = LB_STEAL_FD(fd);
            return 1;
        }
    }
}

int lb_journal_lock(const char *state_dir, const char *token_hex, unsigned timeout_ms,
                    struct lb_error *err)
{
    LB_AUTO_FREE char *path = token_path(state_dir, token_hex, ".lock", err);
    LB_AUTO_FREE char *dir = lb_asprintf("%s/handover", state_dir);
    uint64_t deadline_ns = lb_now_ns() + (uint64_t)timeout_ms * 1000000;
    int fd = -1;

    if (!path || lb_mkdir_p(dir, 0700, err) < 0)
        return -1;
    for (;;) {
        int got = try_lock(path, &fd, err);
        if (got > 0)
            return fd;
        if (got < 0)
            return -1;
        if (lb_now_ns() >= deadline_ns) {
            lb_fail(err, LB_E_STATE, "another process has been deciding the hand-over %s for %u ms",
                    token_hex, timeout_ms);
            return lb_remedy(err, "wait for it, or look at the session's log");
        }
        lb_sleep_ms(LOCK_POLL_MS);
    }
}

/* ----------------------------------------------------------- list and prune */

static int by_token(const void *a, const void *b)
{
    return strcmp(((const struct lb_journal *)a)->token, ((const struct lb_journal *)b)->token);
}

/* NULL with *missing when there is no directory yet. */
static DIR *open_dir(const char *state_dir, bool *missing, struct lb_error *err)
{
    LB_AUTO_FREE char *dir = lb_asprintf("%s/handover", state_dir);
    DIR *d = opendir(dir);
    *missing = !d && errno == ENOENT;
    if (!d && !*missing)
        lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", dir);
    return d;
}

/* "TOKEN.json" -> token */
static bool journal_name(const char *name, char token[LB_TOKEN_HEX])
{
    if (strlen(name) != LB_TOKEN_HEX - 1 + 5 || strcmp(name + LB_TOKEN_HEX - 1, ".json"))
        return false;
    memcpy(token, name, LB_TOKEN_HEX - 1);
    token[LB_TOKEN_HEX - 1] = '\0';
    return token_valid(token);
}

int lb_journal_list(const char *state_dir, struct lb_journal **v, unsigned *n,
                    struct lb_error *err)
{
    bool missing;
    DIR *d = open_dir(state_dir, &missing, err);
    struct lb_journal *list = NULL;
    unsigned used = 0, cap = 0;

    if (!d && !missing)
        return -1;
    for (struct dirent *e; d && (e = readdir(d));) {
        char token[LB_TOKEN_HEX];
        struct lb_journal j;
        struct lb_error why = LB_ERROR_INIT;
        if (!journal_name(e->d_name, token))
            continue;
        if (lb_journal_load(state_dir, token, &j, &why) < 0) {
            lb_log_error(LB_LOG_ERROR, &why);
            continue;
        }
        if (j.state == LB_J_NONE) /* pruned meanwhile */
            continue;
        if (used == cap) {
            cap = cap ? 2 * cap : 16;
            list = lb_realloc(list, cap * sizeof(*list));
        }
        list[used++] = j;
    }
    if (d)
        closedir(d);
    if (used)
        qsort(list, used, sizeof(*list), by_token);
    *v = list;
    *n = used;
    return 0;
}

static void prune_one(const char *state_dir, const struct lb_journal *j)
{
    LB_AUTO_FREE char *json = token_path(state_dir, j->token, ".json", NULL);
    LB_AUTO_FREE char *lock = token_path(state_dir, j->token, ".lock", NULL);
    LB_AUTO_FD int fd = lb_journal_lock(state_dir, j->token, 0, NULL);
    struct lb_journal now;

    if (fd < 0) /* somebody looks at it: next time */
        return;
    if (lb_journal_load(state_dir, j->token, &now, NULL) == 0 && now.state == j->state) {
        unlink(json);
        unlink(lock);
    }
}

/* Temporary files of writers that were killed,. */
static void prune_litter(const char *state_dir, uint64_t now_ms)
{
    bool missing;
    DIR *d = open_dir(state_dir, &missing, NULL);
    for (struct dirent *e; d && (e = readdir(d));) {
        size_t len = strlen(e->d_name);
        struct stat st;
        bool tmp = e->d_name[0] == '.' && len > 4 && !strcmp(e->d_name + len - 4, ".tmp");
        if (tmp && fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            (uint64_t)st.st_mtime * 1000 + KEEP_TMP_MS < now_ms)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    if (d)
        closedir(d);
}

int lb_journal_prune(const char *state_dir, struct lb_error *err)
{
    struct lb_journal *v = NULL;
    unsigned n = 0;
    uint64_t now_ms = lb_wall_ms();

    if (lb_journal_list(state_dir, &v, &n, err) < 0)
        return -1;
    for (unsigned i = 0; i < n; i++) {
        /* Not RUNNING, unless settled: a source that was switched off for longer than we keep files
         * would ask, be told "refused", and run a second copy. */
        bool over = v[i].state == LB_J_DONE || v[i].state == LB_J_ABORTED || v[i].state == LB_J_REFUSED ||
                    (v[i].state == LB_J_RUNNING && v[i].settled);
        if (over && v[i].changed_ms + KEEP_MS < now_ms)
            prune_one(state_dir, &v[i]);
    }
    free(v);
    prune_litter(state_dir, now_ms);
    return 0;
}
