/* core/registry.c - the VMs of this host, as files.
 *
 * One JSON object per VM, replaced as a whole. What a reader cannot understand
 * is an error with the file's name, never a guess: an entry says which of two
 * copies of a guest may run.
 *
 * The lock is an open-file-description lock, because those can be asked about
 * without being taken: looking whether a VM is busy must never make somebody
 * else fail. Removing an entry moves its directory away in one step, so that a
 * lock file is either the one of the present entry or of none; lb_vm_lock looks
 * again after it got one. */
#include "core/core_internal.h"
#include "core/registry.h"
#include "core/json.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_ENTRY_BYTES = 64 << 10, MAX_NAME = 63 };

static const char *const state_names[] = {
    [LB_VM_RUNNING] = "running",         [LB_VM_MIGRATING_OUT] = "migrating-out",
    [LB_VM_INCOMING] = "incoming",       [LB_VM_HANDED_OVER] = "handed-over",
    [LB_VM_DEAD] = "dead",               [LB_VM_PROTECTED] = "protected",
    [LB_VM_STANDBY] = "standby",         [LB_VM_CHECKPOINTING] = "checkpointing",
    [LB_VM_SUSPENDED] = "suspended",     [LB_VM_RESTORING] = "restoring",
    [LB_VM_FILLING] = "filling",
};

const char *lb_vm_state_name(enum lb_vm_state s)
{
    return (unsigned)s < LB_ARRAY_LEN(state_names) ? state_names[s] : "unknown";
}

int lb_vm_state_parse(const char *name, enum lb_vm_state *out)
{
    for (unsigned i = 0; i < LB_ARRAY_LEN(state_names); i++)
        if (!strcmp(name, state_names[i])) {
            *out = (enum lb_vm_state)i;
            return 0;
        }
    return -1;
}

static bool alnum(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

bool lb_vm_name_valid(const char *name)
{
    size_t len = strlen(name);

    if (len < 1 || len > MAX_NAME || !alnum(name[0]))
        return false;
    for (size_t i = 1; i < len; i++)
        if (!alnum(name[i]) && !strchr("._-", name[i]))
            return false;
    return true;
}

/* Where the key stands in the list as a word of its own, or NULL. */
static char *find_key(const char *list, const char *key)
{
    size_t len = strlen(key);

    for (const char *at = list; len && (at = strstr(at, key)); at += len)
        if ((at == list || at[-1] == ' ') && (at[len] == ' ' || !at[len]))
            return (char *)at;
    return NULL;
}

bool lb_came_by_has(const char *list, const char *key)
{
    return find_key(list, key) != NULL;
}

/* Takes the word at `at` out, and the blank at one side of it. */
static void drop_key(char *list, char *at)
{
    char *end = at + strcspn(at, " ");

    if (*end)
        memmove(at, end + 1, strlen(end + 1) + 1);
    else if (at > list)
        at[-1] = '\0';
    else
        *at = '\0';
}

void lb_came_by_add(char list[LB_CAME_BY_BYTES], const char *key)
{
    char *old = find_key(list, key);
    size_t len;

    if (old)
        drop_key(list, old);
    while ((len = strlen(list)) && len + 1 + strlen(key) >= LB_CAME_BY_BYTES)
        drop_key(list, list);
    snprintf(list + len, LB_CAME_BY_BYTES - len, "%s%s", len ? " " : "", key);
}

/* Names become parts of paths: everything here refuses a bad one first. */
static int check_name(const char *name, struct lb_error *err)
{
    if (lb_vm_name_valid(name))
        return 0;
    lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", name);
    return lb_remedy(err, "use at most 63 letters, digits, '.', '_' and '-', "
                          "beginning with a letter or a digit");
}

char *lb_vm_dir(const char *state_dir, const char *name, bool make)
{
    char *dir = lb_asprintf("%s/vms/%s", state_dir, name);

    /* A failure shows at the first use of the directory, with its errno. */
    if (make && lb_vm_name_valid(name))
        lb_mkdir_p(dir, 0700, NULL);
    return dir;
}

static char *file_of(const char *state_dir, const char *name, const char *file)
{
    return lb_asprintf("%s/vms/%s/%s", state_dir, name, file);
}

/* ------------------------------------------------------------------- entries */

static int damaged(const char *path, const char *what, struct lb_error *err)
{
    lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, what);
    return lb_remedy(err, "if the VM still runs, move this file away and `lifeboat adopt` the VM again");
}

static const char *parse_entry(const json_t *o, const char *name, struct lb_vm_entry *e)
{
    char state[32];
    uint64_t pid;

    if (lb_json_get_string(o, "name", e->name, sizeof(e->name)) || strcmp(e->name, name))
        return "\"name\" is missing or another VM's";
    if (lb_json_get_string(o, "hypervisor", e->hypervisor, sizeof(e->hypervisor)))
        return "\"hypervisor\" is missing or wrong";
    if (lb_json_get_u64(o, "pid", INT64_MAX, &pid) || pid > INT32_MAX)
        return "\"pid\" is missing or wrong";
    e->proc.pid = (pid_t)pid;
    if (lb_json_get_u64(o, "start_ticks", INT64_MAX, &e->proc.start_ticks))
        return "\"start_ticks\" is missing or wrong";
    if (lb_json_get_string(o, "qmp", e->qmp_path, sizeof(e->qmp_path)))
        return "\"qmp\" is missing or wrong";
    if (lb_json_get_string(o, "origin", e->origin, sizeof(e->origin)))
        return "\"origin\" is missing or wrong";
    if (lb_json_get_string(o, "state", state, sizeof(state)) || lb_vm_state_parse(state, &e->state))
        return "\"state\" is missing or unknown";
    if (lb_json_get_string(o, "token", e->token, sizeof(e->token)))
        return "\"token\" is missing or wrong";
    if (lb_json_get_string(o, "peer", e->peer, sizeof(e->peer)))
        return "\"peer\" is missing or wrong";
    if (lb_json_get_u64(o, "created_ms", INT64_MAX, &e->created_ms) || lb_json_get_u64(o, "changed_ms", INT64_MAX, &e->changed_ms))
        return "a time is missing or wrong";
    if (lb_json_get_string(o, "note", e->note, sizeof(e->note)))
        return "\"note\" is missing or wrong";
    e->checkpoint[0] = e->came_by[0] = 0; /* absent in entries of older versions */
    if (json_object_get(o, "came_by") && lb_json_get_string(o, "came_by", e->came_by, sizeof(e->came_by)))
        return "\"came_by\" is wrong";
    if (json_object_get(o, "checkpoint") && lb_json_get_string(o, "checkpoint", e->checkpoint, sizeof(e->checkpoint)))
        return "\"checkpoint\" is wrong";
    return NULL;
}

int lb_vm_entry_load(const char *state_dir, const char *name, struct lb_vm_entry *out,
                     struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry e = {0};
    json_error_t jerr;
    const char *wrong;
    size_t len;
    json_t *o;

    if (check_name(name, err))
        return -1;
    LB_AUTO_FREE char *path = file_of(state_dir, name, "vm.json");
    if (lb_file_read(path, MAX_ENTRY_BYTES, &text, &len, &why)) {
        if (why.code == LB_E_NOT_FOUND) {
            lb_fail(err, LB_E_NOT_FOUND, "there is no VM named %s here", name);
            return lb_remedy(err, "`lifeboat ls` lists the VMs of this host, `lifeboat history %s` where it went", name);
        }
        if (err)
            *err = why;
        return -1;
    }
    o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    if (!o)
        return damaged(path, jerr.text, err);
    wrong = parse_entry(o, name, &e);
    json_decref(o);
    if (wrong)
        return damaged(path, wrong, err);
    *out = e;
    return 0;
}

char *lb_vm_qmp_path(const char *state_dir, const char *name)
{
    return file_of(state_dir, name, LB_VM_QMP_SOCK);
}

int lb_vm_entry_save(const char *state_dir, const struct lb_vm_entry *e, struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    uint64_t now = lb_wall_ms();
    json_t *o;

    if (check_name(e->name, err))
        return -1;
    LB_AUTO_FREE char *dir = file_of(state_dir, e->name, "");
    LB_AUTO_FREE char *path = file_of(state_dir, e->name, "vm.json");
    if (lb_mkdir_p(dir, 0700, err))
        return -1;
    o = json_object();
    json_object_set_new(o, "name", json_string(e->name));
    json_object_set_new(o, "hypervisor", lb_json_text(e->hypervisor));
    json_object_set_new(o, "pid", json_integer(e->proc.pid));
    json_object_set_new(o, "start_ticks", json_integer((json_int_t)e->proc.start_ticks));
    json_object_set_new(o, "qmp", lb_json_text(e->qmp_path));
    json_object_set_new(o, "origin", lb_json_text(e->origin));
    json_object_set_new(o, "state", json_string(lb_vm_state_name(e->state)));
    json_object_set_new(o, "token", lb_json_text(e->token));
    json_object_set_new(o, "peer", lb_json_text(e->peer));
    json_object_set_new(o, "created_ms",
                        json_integer((json_int_t)(e->created_ms ? e->created_ms : now)));
    json_object_set_new(o, "changed_ms", json_integer((json_int_t)now));
    json_object_set_new(o, "note", lb_json_text(e->note));
    json_object_set_new(o, "came_by", lb_json_text(e->came_by));
    json_object_set_new(o, "checkpoint", lb_json_text(e->checkpoint));
    text = json_dumps(o, JSON_INDENT(2));
    json_decref(o);
    if (!text)
        return lb_fail(err, LB_E_INTERNAL, "cannot write the entry of VM %s as JSON", e->name);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

static int sync_vms(const char *state_dir, struct lb_error *err)
{
    LB_AUTO_FREE char *vms = lb_asprintf("%s/vms", state_dir);

    return lb_sync_dir(vms, err);
}

/* Nothing in it but the lock and what a crash left of vm.json? */
static bool holds_nothing(const char *dir)
{
    bool nothing = true;
    struct dirent *d;
    DIR *v = opendir(dir);

    while (v && nothing && (d = readdir(v)))
        nothing = d->d_name[0] == '.' || !strcmp(d->d_name, "lock");
    if (v)
        closedir(v);
    return v && nothing;
}

int lb_vm_entry_remove(const char *state_dir, const char *name, struct lb_error *err)
{
    struct lb_error why = LB_ERROR_INIT;
    struct lb_vm_entry e;
    bool keep;

    if (check_name(name, err))
        return -1;
    LB_AUTO_FREE char *dir = lb_vm_dir(state_dir, name, false);
    LB_AUTO_FREE char *path = file_of(state_dir, name, "vm.json");

    /* A VM that lives on (release) keeps its control socket and its log; without an
     * entry they are those of such a VM. */
    if (!lb_vm_entry_load(state_dir, name, &e, &why)) {
        keep = e.proc.pid > 0 && lb_proc_alive(&e.proc);
    } else if (why.code == LB_E_NOT_FOUND) {
        keep = true;
    } else { /* it may say that a VM runs: a person has to look */
        if (err)
            *err = why;
        return -1;
    }
    if (keep) {
        if (unlink(path) < 0 && errno != ENOENT)
            return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", path);
        lb_sync_dir(dir, NULL);
        if (!holds_nothing(dir))
            return 0;
    }
    LB_AUTO_FREE char *gone =
        lb_asprintf("%s/vms/.gone.%s.%d.%" PRIu64, state_dir, name, (int)getpid(), lb_now_ns());
    if (rename(dir, gone) < 0) {
        if (errno == ENOENT)
            return 0;
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot remove %s", dir);
    }
    if (sync_vms(state_dir, err))
        return -1;
    return lb_remove_tree(gone, err);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct lb_vm_entry *)a)->name, ((const struct lb_vm_entry *)b)->name);
}

int lb_vm_entry_list(const char *state_dir, struct lb_vm_entry **v, unsigned *n,
                     struct lb_error *err)
{
    LB_AUTO_FREE char *vms = lb_asprintf("%s/vms", state_dir);
    struct lb_vm_entry *list = NULL;
    unsigned count = 0, cap = 0;
    struct dirent *d;
    DIR *dir = opendir(vms);

    if (!dir && errno != ENOENT)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot read %s", vms);
    while (dir && (d = readdir(dir))) {
        struct lb_error why = LB_ERROR_INIT;

        if (!lb_vm_name_valid(d->d_name))
            continue;
        if (count == cap) {
            cap = cap ? 2 * cap : 16;
            list = lb_realloc(list, cap * sizeof(*list));
        }
        if (!lb_vm_entry_load(state_dir, d->d_name, &list[count], &why))
            count++;
        else if (why.code != LB_E_NOT_FOUND) /* a directory without an entry is being made or left */
            lb_log_error(LB_LOG_WARN, &why);
    }
    if (dir)
        closedir(dir);
    if (count)
        qsort(list, count, sizeof(*list), by_name);
    *v = list;
    *n = count;
    return 0;
}

/* --------------------------------------------------------------------- locks */

static struct flock whole_file(void)
{
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
}

int lb_vm_lock(const char *state_dir, const char *name, struct lb_error *err)
{
    if (check_name(name, err))
        return -1;
    LB_AUTO_FREE char *dir = file_of(state_dir, name, "");
    LB_AUTO_FREE char *path = file_of(state_dir, name, "lock");

    for (;;) {
        struct stat mine, now;
        struct flock fl = whole_file();

        if (lb_mkdir_p(dir, 0700, err))
            return -1;
        LB_AUTO_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0) {
            if (errno == ENOENT) /* removed in between */
                continue;
            return lb_fail_errno(err, lb_errcode_of_errno(errno), errno, "cannot open %s", path);
        }
        if (fcntl(fd, F_OFD_SETLK, &fl) < 0) {
            if (errno != EAGAIN && errno != EACCES)
                return lb_fail_errno(err, LB_E_INTERNAL, errno, "cannot lock %s", path);
            lb_fail(err, LB_E_STATE, "VM %s is busy: a session works on it", name);
            return lb_remedy(err, "`lifeboat status %s` shows it, `lifeboat cancel %s` stops it",
                             name, name);
        }
        if (!fstat(fd, &mine) && !stat(path, &now) && mine.st_ino == now.st_ino &&
            mine.st_dev == now.st_dev)
            return LB_STEAL_FD(fd);
    }
}

int lb_vm_lock_patiently(const char *state_dir, const char *name, unsigned wait_ms,
                         struct lb_error *err)
{
    uint64_t until = lb_now_ns() + (uint64_t)wait_ms * 1000000;

    for (;;) {
        struct lb_error why = LB_ERROR_INIT;
        int fd = lb_vm_lock(state_dir, name, &why);

        if (fd >= 0 || why.code != LB_E_STATE || lb_now_ns() > until) {
            if (fd < 0 && err)
                *err = why;
            return fd;
        }
        lb_sleep_ms(20);
    }
}

bool lb_vm_is_locked(const char *state_dir, const char *name)
{
    struct flock fl = whole_file();

    if (!lb_vm_name_valid(name))
        return false;
    LB_AUTO_FREE char *path = file_of(state_dir, name, "lock");
    LB_AUTO_FD int fd = open(path, O_RDWR | O_CLOEXEC);
    return fd >= 0 && fcntl(fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
}
