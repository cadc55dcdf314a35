/*
 * cmd/cli/checkpoint.c - lifeboat checkpoint NAME, and ls, show, verify, rm, prune, export, import.
 *
 * The first argument says which: a word of the table below, else the name of a VM (`checkpoint take NAME` for one
 * that is called like a word).
 */
#include "cmd/cli/keys.h"

#include <errno.h>
#include <string.h>

enum {
    OPT_LABEL = 256, OPT_NO_DISK, OPT_FULL, OPT_LEVEL, OPT_BANDWIDTH, OPT_EVERY, OPT_KEEP, OPT_QUICK, OPT_OLDER,
    OPT_LABELLED, OPT_DRY_RUN, OPT_AS, OPT_FORCE,
};
enum { MAX_REFS = 1000 };

struct args {
    struct lb_work work;
    char *refs[MAX_REFS];
    unsigned n_refs, min_refs, max_refs;
    const char *wanted;        /* what the arguments are, for messages */
    char *label, *as;
    bool no_disk, full, quick, labelled, dry_run, yes, force, has_keep;
    int level;
    uint64_t bandwidth, older_ms, every_ms;
    bool every, every_off;
    unsigned long keep;
};

static void set_every(struct args *a, const char *arg, struct argp_state *state)
{
    struct lb_error err = LB_ERROR_INIT;

    a->every = true;
    a->every_off = !strcmp(arg, "off");
    if (!a->every_off && lb_parse_duration_ms(arg, &a->every_ms, &err))
        argp_error(state, "--every: %s; %s", err.message, err.remedy);
    if (!a->every_off && a->every_ms < 10000)
        argp_error(state, "--every: at least 10s");
}

/* "7d" besides what durations have. */
static uint64_t older(const char *arg, struct argp_state *state)
{
    size_t len = strlen(arg);
    unsigned long days = 0;
    char number[16];

    if (len > 1 && len < sizeof(number) && arg[len - 1] == 'd') {
        snprintf(number, sizeof(number), "%.*s", (int)len - 1, arg);
        if (lb_arg_number(number, 1, 36500, &days))
            return (uint64_t)days * 86400000u;
    }
    return lb_arg_duration(arg, 1000, "--older", state);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        lb_work_inputs(&a->work, state);
        return 0;
    case OPT_LABEL:
        a->label = arg;
        return 0;
    case OPT_NO_DISK:
        a->no_disk = true;
        return 0;
    case OPT_FULL:
        a->full = true;
        return 0;
    case OPT_LEVEL:
        a->level = lb_arg_level(arg, state);
        return 0;
    case OPT_BANDWIDTH:
        a->bandwidth = lb_arg_rate(arg, state);
        return 0;
    case OPT_EVERY:
        set_every(a, arg, state);
        return 0;
    case OPT_KEEP:
        if (!lb_arg_number(arg, 1, 1000000, &a->keep))
            argp_error(state, "--keep takes a number from 1");
        a->has_keep = true;
        return 0;
    case OPT_QUICK:
        a->quick = true;
        return 0;
    case OPT_OLDER:
        a->older_ms = older(arg, state);
        return 0;
    case OPT_LABELLED:
        a->labelled = true;
        return 0;
    case OPT_DRY_RUN:
        a->dry_run = true;
        return 0;
    case 'y':
        a->yes = true;
        return 0;
    case OPT_AS:
        a->as = arg;
        return 0;
    case OPT_FORCE:
        a->force = true;
        return 0;
    case ARGP_KEY_ARG:
        if (a->n_refs == a->max_refs)
            argp_error(state, "unexpected argument \"%s\"", arg);
        a->refs[a->n_refs++] = arg;
        return 0;
    case ARGP_KEY_END:
        if (a->n_refs < a->min_refs)
            argp_error(state, "%s: missing", a->wanted);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* One of the words: its options, then its arguments in a. */
struct word {
    const char *name, *args, *doc;
    unsigned min, max;
    const struct argp_option *options;
    int (*run)(struct args *a, const struct word *w);
};

/* ---------------------------------------------------------------------------- take */

static void show_taken(const json_t *o)
{
    char raw[32], file[32], pause[32], total[32];
    long long pages = (long long)lb_jint(o, "pages");

    printf("%s: %s%s%s, paused %s, %s in all; ", lb_jstr(o, "ref"),
           lb_jbool(o, "increment") ? "increment" : "full", lb_jbool(o, "encrypted") ? ", encrypted" : "",
           lb_jint(o, "disks") ? ", with disks" : "", lb_span(pause, sizeof(pause), lb_jnum(o, "pause_ms")),
           lb_span(total, sizeof(total), lb_jnum(o, "total_ms")));
    if (lb_jbool(o, "increment"))
        printf("%lld of %lld pages changed", pages - (long long)lb_jint(o, "unchanged_pages"), pages);
    else
        printf("%s of memory", lb_human_bytes(raw, sizeof(raw), lb_jnum(o, "raw_bytes")));
    printf(", %s on disk\n", lb_human_bytes(file, sizeof(file), lb_jnum(o, "file_bytes")));
}

static void show_schedule(const json_t *o)
{
    printf("VM %s: ", lb_jstr(o, "vm"));
    lb_print_schedule(o);
}

static int schedule(struct args *a)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcSchedule m = LB__RPC_SCHEDULE__INIT;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *key = a->work.key.file ? realpath(a->work.key.file, NULL) : lb_strdup("");

    if (!key) {
        lb_fail_errno(&err, LB_E_NOT_FOUND, errno, "cannot find the key file %s", a->work.key.file);
        return lb_cli_fail(a->work.watch.cli, &err);
    }
    if (a->work.key.ask || a->work.key.passphrase_file) {
        lb_fail(&err, LB_E_USAGE, "a schedule has nobody to ask for a passphrase");
        lb_remedy(&err, "give --key FILE");
        return lb_cli_fail(a->work.watch.cli, &err);
    }
    m.name = a->refs[0];
    m.every_ms = a->every_ms;
    m.keep = (uint32_t)a->keep;
    m.no_disk = a->no_disk;
    m.key_file = key;
    m.off = a->every_off;
    r.kind_case = LB__RPC_REQUEST__KIND_SCHEDULE;
    r.schedule = &m;
    return lb_ask(a->work.watch.cli, &r, show_schedule);
}

static const struct argp_option take_options[] = {
    {"label", OPT_LABEL, "TEXT", 0, "NAME@TEXT names it as well; prune leaves it alone", 0},
    {"no-disk", OPT_NO_DISK, NULL, 0, "Memory and devices alone: the disks go on changing under it", 0},
    {"full", OPT_FULL, NULL, 0, "Not only what differs from the one before", 0},
    {"level", OPT_LEVEL, "N", 0, "zstd level, -7 (fastest) to 19 (default 1)", 0},
    {"bandwidth", OPT_BANDWIDTH, "RATE", 0, "Read memory no faster than this while the guest runs", 0},
    {"every", OPT_EVERY, "TIME", 0, "Take one this often from now on, e.g. 10m; off: no more", 1},
    {"keep", OPT_KEEP, "N", 0, "With --every: keep the latest N (default 24)", 1},
    {0},
};

static int take(struct args *a, const struct word *w)
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcCheckpoint m = LB__RPC_CHECKPOINT__INIT;

    (void)w;
    if (a->every) {
        if (!a->has_keep)
            a->keep = 24;
        return schedule(a);
    }
    m.name = a->refs[0];
    m.label = a->label ? a->label : (char *)"";
    m.no_disk = a->no_disk;
    m.full = a->full;
    m.zstd_level = a->level;
    m.bandwidth_bytes_per_s = a->bandwidth;
    r.kind_case = LB__RPC_REQUEST__KIND_CHECKPOINT;
    r.checkpoint = &m;
    return lb_work_run(&a->work, true, &r, &m.key, show_taken, NULL);
}

/* ------------------------------------------------------------------- the catalog */

static int ask_catalog(struct args *a, const char *op, Lb__RpcCatalog *m, void (*show)(const json_t *o))
{
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;

    m->op = (char *)op;
    if (!m->refs) {
        m->refs = a->refs;
        m->n_refs = a->n_refs;
    }
    r.kind_case = LB__RPC_REQUEST__KIND_CATALOG;
    r.catalog = m;
    a->work.watch.vm = a->n_refs ? a->refs[0] : "";
    a->work.watch.stops = true;
    return lb_work_run(&a->work, false, &r, &m->key, show, NULL);
}

static void show_list(const json_t *o)
{
    static const char *const heads[] = {"CHECKPOINT", "LABEL", "TAKEN", "KIND", "FILE", "MEMORY", "FILES", "NOTE"};
    struct lb_table *t = lb_table_new(LB_ARRAY_LEN(heads), heads);
    size_t i;
    json_t *c;

    json_array_foreach (json_object_get(o, "checkpoints"), i, c) {
        char when[32], bytes[32];

        lb_table_cell(t, "%s", lb_jstr(c, "ref"));
        lb_table_cell(t, "%s", lb_jstr(c, "label"));
        lb_table_cell(t, "%s", lb_jnum(c, "created_ms") > 0 ? lb_when(when, lb_jnum(c, "created_ms")) : "");
        lb_table_cell(t, "%s%s%s", lb_jbool(c, "suspend") ? "suspended" : lb_jbool(c, "increment") ? "increment" : "full",
                      lb_jbool(c, "encrypted") ? ", encrypted" : "", lb_jbool(c, "no_disk") ? ", no disk" : "");
        lb_table_cell(t, "%s", lb_human_bytes(bytes, sizeof(bytes), lb_jnum(c, "file_bytes")));
        lb_table_cell(t, "%s",
                      lb_jnum(c, "ram_bytes") > 0 ? lb_human_bytes(bytes, sizeof(bytes), lb_jnum(c, "ram_bytes")) : "");
        lb_table_cell(t, "%lld", (long long)lb_jint(c, "depth"));
        lb_table_cell(t, "%s", lb_jbool(c, "readable") ? "" : lb_jstr(c, "error"));
    }
    lb_table_print(t);
}

static int ls(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;

    return ask_catalog(a, w->name, &m, show_list);
}

static void line(const char *key, const char *fmt, ...) LB_PRINTF(2, 3);
static void line(const char *key, const char *fmt, ...)
{
    char text[1024];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    printf("%-12s ", key);
    lb_print_text(stdout, text);
    putchar('\n');
}

static void show_one(const json_t *c)
{
    char when[32], bytes[32], raw[32], pause[32];
    size_t i;
    json_t *d;

    line("checkpoint", "%s", lb_jstr(c, "ref"));
    line("file", "%s (%s)", lb_jstr(c, "path"), lb_human_bytes(bytes, sizeof(bytes), lb_jnum(c, "file_bytes")));
    if (lb_jstr(c, "label")[0])
        line("label", "%s", lb_jstr(c, "label"));
    line("id", "%s", lb_jstr(c, "id"));
    line("encrypted", "%s", lb_jbool(c, "encrypted") ? lb_jstr(c, "key") : "no");
    if (!lb_jbool(c, "readable")) {
        line("unreadable", "%s", lb_jstr(c, "error"));
        if (lb_jstr(c, "remedy")[0])
            line("remedy", "%s", lb_jstr(c, "remedy"));
        return;
    }
    line("taken", "%s, guest paused %s", lb_when(when, lb_jnum(c, "created_ms")),
         lb_jbool(c, "suspend") ? "for good" : lb_span(pause, sizeof(pause), lb_jnum(c, "pause_ms")));
    line("kind", "%s", lb_jbool(c, "suspend") ? "suspended" : lb_jbool(c, "increment") ? "increment" : "full");
    line("memory", "%s; %lld pages stored, %lld as another, %lld as the parent's, %lld differences, %lld zero",
         lb_human_bytes(raw, sizeof(raw), lb_jnum(c, "ram_bytes")), (long long)lb_jint(c, "stored_pages"),
         (long long)lb_jint(c, "same_pages"), (long long)lb_jint(c, "unchanged_pages"), (long long)lb_jint(c, "delta_pages"),
         (long long)lb_jint(c, "zero_pages"));
    line("machine", "%s, %s, %lld x %s, QEMU %s", lb_jstr(c, "machine"), lb_jstr(c, "accel"), (long long)lb_jint(c, "vcpus"),
         lb_jstr(c, "cpu_model"), lb_jstr(c, "hv_version"));
    json_array_foreach (json_object_get(c, "chain"), i, d)
        line(i ? "" : "files read", "%s", json_string_value(d) ? json_string_value(d) : "");
    if (lb_jbool(c, "no_disk"))
        line("disks", "left out");
    json_array_foreach (json_object_get(c, "disks"), i, d)
        line(i ? "" : "disks", "%s: %s (%s, %s)", lb_jstr(d, "id"), lb_jstr(d, "path"), lb_jstr(d, "format"),
             lb_human_bytes(bytes, sizeof(bytes), lb_jnum(d, "size_bytes")));
}

static int show(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;

    return ask_catalog(a, w->name, &m, show_one);
}

static int judge_verified(const json_t *o)
{
    return lb_jbool(o, "ok") ? 0 : lb_errcode_exit(LB_E_PROTO);
}

static void show_verified(const json_t *o)
{
    size_t i, k;
    json_t *c, *p;

    json_array_foreach (json_object_get(o, "checked"), i, c) {
        printf("%s: %s\n", lb_jstr(c, "ref"), lb_jbool(c, "ok") ? "whole" : "DAMAGED");
        json_array_foreach (json_object_get(c, "problems"), k, p) {
            printf("  ");
            lb_print_text(stdout, json_string_value(p) ? json_string_value(p) : "");
            putchar('\n');
        }
    }
}

static const struct argp_option verify_options[] = {
    {"quick", OPT_QUICK, NULL, 0, "Checksums of the parts alone; no page is unpacked", 0},
    {0},
};

static int verify(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;

    m.deep = !a->quick;
    a->work.watch.judge = judge_verified;
    return ask_catalog(a, w->name, &m, show_verified);
}

static void show_gone(const json_t *o)
{
    json_t *list = json_object_get(o, "would_remove");
    char freed[32];
    size_t i;
    json_t *ref;

    if (json_is_array(list)) {
        json_array_foreach (list, i, ref)
            printf("would remove %s\n", json_string_value(ref) ? json_string_value(ref) : "");
        return;
    }
    printf("%lld removed, %lld written again without them, %s freed", (long long)lb_jint(o, "removed"),
           (long long)lb_jint(o, "joined"), lb_human_bytes(freed, sizeof(freed), lb_jnum(o, "freed_bytes")));
    if (lb_jint(o, "images_joined"))
        printf("; %lld disk images joined", (long long)lb_jint(o, "images_joined"));
    if (lb_jint(o, "images_kept"))
        printf("; %lld disk images stay: the VM does not run here, or another one stands on them",
               (long long)lb_jint(o, "images_kept"));
    putchar('\n');
}

/* On a terminal people are asked. */
static bool sure(const struct args *a, const char *what)
{
    char answer[16];

    if (a->yes || a->dry_run || a->work.watch.cli->json || !isatty(STDIN_FILENO))
        return true;
    printf("%s (y/N)? ", what);
    fflush(stdout);
    return fgets(answer, sizeof(answer), stdin) && (answer[0] == 'y' || answer[0] == 'Y');
}

static const struct argp_option rm_options[] = {
    {"dry-run", OPT_DRY_RUN, NULL, 0, "Only say what would go", 0},
    {"force", OPT_FORCE, NULL, 0, "Also NAME@suspend: the suspended VM is gone with it", 0},
    {"yes", 'y', NULL, 0, "Do not ask", 0},
    {0},
};

static int rm(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;

    m.dry_run = a->dry_run;
    m.force = a->force;
    if (!sure(a, a->n_refs == 1 ? "Remove this checkpoint for good" : "Remove these checkpoints for good"))
        return 0;
    return ask_catalog(a, w->name, &m, show_gone);
}

static const struct argp_option prune_options[] = {
    {"keep", OPT_KEEP, "N", 0, "The latest N of each VM stay, however old they are", 0},
    {"older", OPT_OLDER, "TIME", 0, "Only those older than this, e.g. 12h or 7d", 0},
    {"labelled", OPT_LABELLED, NULL, 0, "Those with a label, too", 0},
    {"dry-run", OPT_DRY_RUN, NULL, 0, "Only say what would go", 0},
    {"yes", 'y', NULL, 0, "Do not ask", 0},
    {0},
};

static int prune(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;
    struct lb_error err = LB_ERROR_INIT;

    if (!a->has_keep && !a->older_ms) {
        lb_fail(&err, LB_E_USAGE, "prune needs --keep N, --older TIME, or both");
        return lb_cli_fail(a->work.watch.cli, &err);
    }
    m.keep = (uint32_t)a->keep;
    m.older_ms = a->older_ms;
    m.labelled = a->labelled;
    m.dry_run = a->dry_run;
    if (!sure(a, "Remove the older checkpoints for good"))
        return 0;
    return ask_catalog(a, w->name, &m, show_gone);
}

static void show_exported(const json_t *o)
{
    printf("%s is in %s\n", lb_jstr(o, "ref"), lb_jstr(o, "to"));
}

static const struct argp_option export_options[] = {
    {"no-disk", OPT_NO_DISK, NULL, 0, "Memory and devices alone", 0},
    {0},
};

static int export(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;
    LB_AUTO_FREE char *cwd = a->refs[1][0] == '/' ? lb_strdup("") : getcwd(NULL, 0);
    LB_AUTO_FREE char *to = lb_asprintf("%s%s%s", cwd ? cwd : "", cwd && cwd[0] ? "/" : "", a->refs[1]);

    m.refs = a->refs;
    m.n_refs = 1;
    m.to = to;
    m.no_disk = a->no_disk;
    return ask_catalog(a, w->name, &m, show_exported);
}

static void show_imported(const json_t *c)
{
    printf("%s: `lifeboat restore %s` runs it\n", lb_jstr(c, "ref"), lb_jstr(c, "ref"));
}

static const struct argp_option import_options[] = {
    {"as", OPT_AS, "VM", 0, "As a checkpoint of this VM (default: the name it had)", 0},
    {0},
};

static int import(struct args *a, const struct word *w)
{
    Lb__RpcCatalog m = LB__RPC_CATALOG__INIT;
    struct lb_error err = LB_ERROR_INIT;
    LB_AUTO_FREE char *from = realpath(a->refs[0], NULL);

    if (!from) {
        lb_fail_errno(&err, LB_E_NOT_FOUND, errno, "cannot find the folder %s", a->refs[0]);
        return lb_cli_fail(a->work.watch.cli, &err);
    }
    m.refs = &from;
    m.n_refs = 1;
    m.as = a->as ? a->as : (char *)"";
    return ask_catalog(a, w->name, &m, show_imported);
}

/* ------------------------------------------------------------------- dispatching */

static const struct word words[] = {
    {"take", "NAME", "Take a checkpoint of a running VM: paused for milliseconds, and only what has changed since the one before "
     "is written.\vThe words take, ls, show, verify, rm, prune, export and import come first: `lifeboat checkpoint ls --help`.",
     1, 1, take_options, take},
    {"ls", "[VM...]", "List checkpoints.", 0, MAX_REFS, NULL, ls},
    {"show", "CHECKPOINT", "Show one: what it holds, which files and images it needs.", 1, 1, NULL, show},
    {"verify", "CHECKPOINT...", "Read it all and compare every checksum. Damage is named; the exit status tells.", 1, MAX_REFS,
     verify_options, verify},
    {"rm", "CHECKPOINT...", "Remove checkpoints. Those that stand on them are written again first.", 1, MAX_REFS, rm_options, rm},
    {"prune", "[VM...]", "Remove all but the latest, of these VMs or all.", 0, MAX_REFS, prune_options, prune},
    {"export", "CHECKPOINT FOLDER", "Write one with all it needs, disks included, to a folder.", 2, 2, export_options, export},
    {"import", "FOLDER", "Take an exported checkpoint in.", 1, 1, import_options, import},
};

static const struct word *find_word(const char *name)
{
    for (size_t i = 0; i < LB_ARRAY_LEN(words); i++)
        if (!strcmp(words[i].name, name))
            return &words[i];
    return NULL;
}

static bool goes_with_every_word(const char *arg)
{
    static const char *const options[] = {"--json", "--quiet", "-q", "--detach", "--progress"};

    for (size_t i = 0; i < LB_ARRAY_LEN(options); i++)
        if (!strcmp(arg, options[i]))
            return true;
    return false;
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    int at = 1;

    while (at < argc && goes_with_every_word(argv[at]))
        at++;
    const struct word *w = at < argc ? find_word(argv[at]) : NULL;
    LB_AUTO_FREE char *name = lb_asprintf("checkpoint%s%s", w ? " " : "", w ? w->name : "");
    LB_AUTO_FREE struct args *a = lb_alloc(sizeof(*a));

    if (w) {
        memmove(argv + at, argv + at + 1, (size_t)(argc - at) * sizeof(*argv)); /* the NULL at the end, too */
        argc--;
    } else {
        w = &words[0];
    }
    const struct argp argp = {w->options, parse, w->args, w->doc, lb_work_children, NULL, NULL};
    a->work.watch.cli = cli;
    a->min_refs = w->min;
    a->max_refs = w->max;
    a->wanted = w->args;
    lb_parse(name, &argp, 0, argc, argv, a);
    a->work.watch.vm = a->n_refs ? a->refs[0] : "";
    return w->run(a, w);
}

const struct lb_cmd lb_cmd_checkpoint = {"checkpoint", "NAME|ls|show|verify|rm|prune|export|import ...",
                                         "Checkpoints of running VMs: take, list, check, remove, move", run};
