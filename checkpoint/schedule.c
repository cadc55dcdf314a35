/* checkpoint/schedule.c - vms/NAME/schedule.json: how often a VM gets a checkpoint, and how the last ones went. */
#include "checkpoint/checkpoint.h"
#include "core/json.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>

#define MAX_BYTES (64u << 10)
#define MIN_EVERY_MS UINT64_C(10000)
#define MAX_EVERY_MS (UINT64_C(366) * 24 * 3600 * 1000)
#define MAX_KEEP 100000u
#define BACK_OFF_MS UINT64_C(3600000)
#define BACK_OFF_SHIFT 3u /* 8 times */

static char *path_of(const char *state_dir, const char *vm)
{
    return lb_asprintf("%s/vms/%s/schedule.json", state_dir, vm);
}

static int check_name(const char *vm, struct lb_error *err)
{
    return lb_vm_name_valid(vm) ? 0 : lb_fail(err, LB_E_USAGE, "\"%.80s\" is not a valid VM name", vm);
}

static int check(const struct lb_ckpt_schedule *s, struct lb_error *err)
{
    if (s->every_ms < MIN_EVERY_MS || s->every_ms > MAX_EVERY_MS) {
        lb_fail(err, LB_E_USAGE, "checkpoints every %.3g s are not possible", (double)s->every_ms / 1000);
        return lb_remedy(err, "use at least 10 s and at most a year; `lifeboat protect` for less");
    }
    if (s->keep < 1 || s->keep > MAX_KEEP) {
        lb_fail(err, LB_E_USAGE, "%u checkpoints cannot be kept", s->keep);
        return lb_remedy(err, "use a number from 1 to %u", MAX_KEEP);
    }
    return 0;
}

/* ------------------------------------------------------------------ the file */

static const char *parse(const json_t *o, struct lb_ckpt_schedule *s)
{
    uint64_t keep, failures;

    if (lb_json_get_u64(o, "every_ms", MAX_EVERY_MS, &s->every_ms))
        return "\"every_ms\" is missing or wrong";
    if (lb_json_get_u64(o, "keep", MAX_KEEP, &keep))
        return "\"keep\" is missing or wrong";
    if (!json_is_boolean(json_object_get(o, "no_disk")))
        return "\"no_disk\" is missing or wrong";
    if (lb_json_get_string(o, "key_file", s->key_file, sizeof(s->key_file)))
        return "\"key_file\" is missing or wrong";
    if (lb_json_get_u64(o, "last_ms", INT64_MAX, &s->last_ms) || lb_json_get_u64(o, "failures", UINT32_MAX, &failures))
        return "\"last_ms\" or \"failures\" is missing or wrong";
    if (lb_json_get_string(o, "error", s->error, sizeof(s->error)))
        return "\"error\" is missing or wrong";
    s->keep = (unsigned)keep;
    s->failures = (unsigned)failures;
    s->no_disk = json_is_true(json_object_get(o, "no_disk"));
    return NULL;
}

int lb_schedule_load(const char *state_dir, const char *vm, struct lb_ckpt_schedule *out, struct lb_error *err)
{
    LB_AUTO_FREE char *path = path_of(state_dir, vm);
    LB_AUTO_FREE char *text = NULL;
    struct lb_error why = LB_ERROR_INIT;
    struct lb_ckpt_schedule s = {0};
    json_error_t jerr;
    const char *wrong;
    size_t len;
    json_t *o;

    if (check_name(vm, err))
        return -1;
    if (lb_file_read(path, MAX_BYTES, &text, &len, &why)) {
        if (why.code == LB_E_NOT_FOUND) {
            lb_fail(err, LB_E_NOT_FOUND, "VM %s has no schedule of checkpoints", vm);
            return lb_remedy(err, "`lifeboat checkpoint %s --every 10m --keep 24` makes one", vm);
        }
        if (err)
            *err = why;
        return -1;
    }
    o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    wrong = o ? parse(o, &s) : jerr.text;
    json_decref(o);
    memset(&why, 0, sizeof(why));
    if (!wrong && check(&s, &why))
        wrong = why.message;
    if (wrong) {
        lb_fail(err, LB_E_STATE, "%s is damaged: %s", path, wrong);
        return lb_remedy(err, "make the schedule of VM %s again", vm);
    }
    *out = s;
    return 0;
}

int lb_schedule_save(const char *state_dir, const char *vm, const struct lb_ckpt_schedule *s,
                     struct lb_error *err)
{
    LB_AUTO_FREE char *text = NULL;
    json_t *o;

    if (check_name(vm, err) || check(s, err))
        return -1;
    LB_AUTO_FREE char *dir = lb_vm_dir(state_dir, vm, true);
    LB_AUTO_FREE char *path = path_of(state_dir, vm);
    o = json_object();
    json_object_set_new(o, "every_ms", json_integer((json_int_t)s->every_ms));
    json_object_set_new(o, "keep", json_integer(s->keep));
    json_object_set_new(o, "no_disk", json_boolean(s->no_disk));
    json_object_set_new(o, "key_file", lb_json_text(s->key_file));
    json_object_set_new(o, "last_ms", json_integer((json_int_t)s->last_ms));
    json_object_set_new(o, "failures", json_integer(s->failures));
    json_object_set_new(o, "error", lb_json_text(s->error));
    text = json_dumps(o, JSON_INDENT(2));
    json_decref(o);
    if (!text)
        return lb_fail(err, LB_E_INTERNAL, "cannot write the schedule of VM %s as JSON", vm);
    return lb_file_write_atomic(path, text, strlen(text), 0600, err);
}

int lb_schedule_remove(const char *state_dir, const char *vm, struct lb_error *err)
{
    if (check_name(vm, err))
        return -1;
    LB_AUTO_FREE char *path = path_of(state_dir, vm);

    return lb_file_remove(path, err);
}

/* ------------------------------------------------------------------ the time */

uint64_t lb_schedule_next_ms(const struct lb_ckpt_schedule *s, uint64_t now_ms)
{
    uint64_t wait = s->every_ms << LB_MIN(s->failures, BACK_OFF_SHIFT);

    if (!s->last_ms)
        return now_ms;
    /* What failed will fail again: later each time, but never by more than an hour. */
    if (wait > BACK_OFF_MS)
        wait = LB_MAX(s->every_ms, BACK_OFF_MS);
    /* A clock that was set back must not keep the next one waiting until it is there again. */
    return LB_MIN(s->last_ms, now_ms) + wait;
}
