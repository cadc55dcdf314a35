/* migrate/config.c - the configuration file of one host; see config.h.
 *
 * Strict on purpose: an unknown key, a value given twice or a half line is an
 * error with file and line. A mapping that is silently ignored would show up as
 * a refused or, worse, a wrongly connected VM much later. */
#include "migrate/config.h"

#include <errno.h>
#include <fnmatch.h>
#include <string.h>
#include <strings.h>

#include "netproto/netproto.h"

enum { MAX_CONFIG_BYTES = 1 << 20, MAX_CHANNELS = 64, MAX_ZSTD_LEVEL = 19, MIN_ZSTD_LEVEL = -50, MAX_WORD = 127,
       MAX_PRIORITY = 1000000 };

static const char remedy_keys[] = "known keys: listen name emulator path tap memory-reserve "
                                  "bandwidth max-downtime channels compress throttle witness "
                                  "backup lease checkpoint-dir checkpoint-key checkpoint-level "
                                  "tag link together apart require-tag forbid-tag vm-priority "
                                  "directory";

/* Each returns 0 or -1 with what is wrong with the value. */
typedef int set_fn(struct lb_host_config *c, char *value, struct lb_error *err);

static char *trim(char *s)
{
    s += strspn(s, " \t\r");
    size_t len = strlen(s);
    while (len && strchr(" \t\r", s[len - 1]))
        s[--len] = '\0';
    return s;
}

static int copy_value(char *out, size_t cap, const char *value, struct lb_error *err)
{
    if (strlen(value) >= cap)
        return lb_fail(err, LB_E_USAGE, "the value is longer than %zu bytes", cap - 1);
    memcpy(out, value, strlen(value) + 1);
    return 0;
}

static int set_listen(struct lb_host_config *c, char *value, struct lb_error *err)
{
    char host[256];
    uint16_t port;
    if (lb_parse_hostport(value, LB_DEFAULT_PORT, host, &port, err) < 0)
        return -1;
    return copy_value(c->listen, sizeof(c->listen), value, err);
}

static int set_name(struct lb_host_config *c, char *value, struct lb_error *err)
{
    for (const char *p = value; *p; p++)
        if ((unsigned char)*p <= ' ' || *p == 0x7f || *p == '/')
            return lb_fail(err, LB_E_USAGE, "a host name has no blanks and no slashes");
    return copy_value(c->name, sizeof(c->name), value, err);
}

/* "FROM -> TO" added to a list. */
static int add_map(struct lb_path_map **v, unsigned *n, bool absolute, char *value,
                   struct lb_error *err)
{
    char *arrow = strstr(value, "->");
    if (!arrow)
        return lb_fail(err, LB_E_USAGE, "\"%s\" is not FROM -> TO", value);
    char *from = value, *to = arrow + 2;
    char *end = arrow;
    to += strspn(to, " \t");
    while (end > from && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    *end = '\0';
    if (!*from || !*to)
        return lb_fail(err, LB_E_USAGE, "one side of -> is empty");
    if (strstr(to, "->"))
        return lb_fail(err, LB_E_USAGE, "there is more than one ->");
    if (absolute && (*from != '/' || *to != '/'))
        return lb_fail(err, LB_E_USAGE, "both sides must be absolute paths");
    for (unsigned i = 0; i < *n; i++)
        if (!strcmp((*v)[i].from, from))
            return lb_fail(err, LB_E_USAGE, "%s is already mapped to %s", from, (*v)[i].to);
    *v = lb_realloc(*v, (*n + 1) * sizeof(**v));
    (*v)[*n].from = lb_strdup(from);
    (*v)[*n].to = lb_strdup(to);
    ++*n;
    return 0;
}

static int set_emulator(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_map(&c->emulators, &c->n_emulators, true, value, err);
}

static int set_path(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_map(&c->paths, &c->n_paths, true, value, err);
}

static int set_tap(struct lb_host_config *c, char *value, struct lb_error *err)
{
    if (add_map(&c->taps, &c->n_taps, false, value, err) < 0)
        return -1;
    const struct lb_path_map *m = &c->taps[c->n_taps - 1];
    if (strlen(m->from) > 15 || strlen(m->to) > 15)
        return lb_fail(err, LB_E_USAGE, "an interface name has at most 15 characters");
    return 0;
}

static int set_reserve(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return lb_parse_size(value, &c->memory_reserve_bytes, err);
}

static int set_bandwidth(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return lb_parse_rate(value, &c->bandwidth_bytes_per_s, err);
}

static int set_downtime(struct lb_host_config *c, char *value, struct lb_error *err)
{
    uint64_t ms;
    if (lb_parse_duration_ms(value, &ms, err) < 0)
        return -1;
    if (ms == 0 || ms > 3600000)
        return lb_fail(err, LB_E_USAGE, "max-downtime is from 1ms to 1h");
    c->max_downtime_ms = (uint32_t)ms;
    return 0;
}

static int set_channels(struct lb_host_config *c, char *value, struct lb_error *err)
{
    size_t len = strlen(value);
    if (!strcmp(value, "auto")) {
        c->channels = 0;
        return 0;
    }
    if (len > 3 || strspn(value, "0123456789") != len || atoi(value) < 1 ||
        atoi(value) > MAX_CHANNELS)
        return lb_fail(err, LB_E_USAGE, "channels is auto or a number from 1 to %d", MAX_CHANNELS);
    c->channels = (uint32_t)atoi(value);
    return 0;
}

static int set_compress(struct lb_host_config *c, char *value, struct lb_error *err)
{
    bool ok = !strcmp(value, "auto") || !strcmp(value, "off") || !strcmp(value, "zstd");
    if (!strncmp(value, "zstd:", 5)) {
        char *end;
        long level = strtol(value + 5, &end, 10);
        ok = value[5] >= '0' && value[5] <= '9' && !*end && level >= 1 && level <= MAX_ZSTD_LEVEL;
    }
    if (!ok)
        return lb_fail(err, LB_E_USAGE, "compress is auto, off, zstd or zstd:LEVEL (1 to %d)",
                       MAX_ZSTD_LEVEL);
    return copy_value(c->compress, sizeof(c->compress), value, err);
}

static int set_throttle(struct lb_host_config *c, char *value, struct lb_error *err)
{
    if (!strcasecmp(value, "yes") || !strcasecmp(value, "true") || !strcasecmp(value, "on"))
        c->throttle = true;
    else if (!strcasecmp(value, "no") || !strcasecmp(value, "false") || !strcasecmp(value, "off"))
        c->throttle = false;
    else
        return lb_fail(err, LB_E_USAGE, "throttle is yes or no");
    return 0;
}

int lb_witness_spec_check(const char *spec, struct lb_error *err)
{
    if (!strcmp(spec, "manual") || (!strncmp(spec, "fence:", 6) && spec[6]) ||
        (!strncmp(spec, "etcd:", 5) && spec[5]))
        return 0;
    lb_fail(err, LB_E_USAGE, "\"%.200s\" is no witness", spec);
    return lb_remedy(err, "give etcd:URL[,URL...], fence:CMD or manual");
}

static int set_witness(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return lb_witness_spec_check(value, err)
               ? -1
               : copy_value(c->witness, sizeof(c->witness), value, err);
}

static int set_backup(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return copy_value(c->backup, sizeof(c->backup), value, err);
}

static int set_lease(struct lb_host_config *c, char *value, struct lb_error *err)
{
    uint64_t ms;
    if (lb_parse_duration_ms(value, &ms, err) < 0)
        return -1;
    if (ms < LB_LEASE_LOWEST_MS || ms > LB_LEASE_HIGHEST_MS)
        return lb_fail(err, LB_E_USAGE, "lease is from %ums to %us", LB_LEASE_LOWEST_MS,
                       LB_LEASE_HIGHEST_MS / 1000);
    c->lease_ms = (uint32_t)ms;
    return 0;
}

static int set_absolute(char *out, size_t cap, const char *value, struct lb_error *err)
{
    if (value[0] != '/')
        return lb_fail(err, LB_E_USAGE, "\"%s\" is not an absolute path", value);
    return copy_value(out, cap, value, err);
}

static int set_checkpoint_dir(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return set_absolute(c->checkpoint_dir, sizeof(c->checkpoint_dir), value, err);
}

static int set_checkpoint_key(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return set_absolute(c->checkpoint_key, sizeof(c->checkpoint_key), value, err);
}

static int set_checkpoint_level(struct lb_host_config *c, char *value, struct lb_error *err)
{
    char *end;
    long level = strtol(value, &end, 10);

    if (*end || level < MIN_ZSTD_LEVEL || level > MAX_ZSTD_LEVEL || !level)
        return lb_fail(err, LB_E_USAGE, "checkpoint-level is from 1 to %d, or negative to %d for speed",
                       MAX_ZSTD_LEVEL, MIN_ZSTD_LEVEL);
    c->checkpoint_level = (int)level;
    return 0;
}

/* -------------------------------------------------------------- placement of VMs */

/* Tags, groups, names and patterns of VMs. */
static int check_word(const char *word, struct lb_error *err)
{
    if (!*word || strlen(word) > MAX_WORD)
        return lb_fail(err, LB_E_USAGE, "\"%.40s\" is not a name of 1 to %d characters", word, MAX_WORD);
    for (const char *p = word; *p; p++)
        if ((unsigned char)*p <= ' ' || (unsigned char)*p >= 0x7f || *p == ':' || *p == '"')
            return lb_fail(err, LB_E_USAGE, "\"%.40s\" is not a name: letters, digits and signs other than : and \"",
                           word);
    return 0;
}

static void add_item(char ***items, const char *word)
{
    size_t n = 0;

    while (*items && (*items)[n])
        n++;
    *items = lb_realloc(*items, (n + 2) * sizeof(**items));
    (*items)[n] = lb_strdup(word);
    (*items)[n + 1] = NULL;
}

static int set_tag(struct lb_host_config *c, char *value, struct lb_error *err)
{
    if (check_word(value, err))
        return -1;
    add_item(&c->tags, value);
    return 0;
}

static int set_link(struct lb_host_config *c, char *value, struct lb_error *err)
{
    if (lb_parse_rate(value, &c->link_bytes_per_s, err))
        return -1;
    return c->link_bytes_per_s ? 0 : lb_fail(err, LB_E_USAGE, "a link of 0 carries nothing");
}

/* "NAME: ..."; returns what follows the colon, or NULL. */
static char *split_rule(char *value, char **name, struct lb_error *err)
{
    char *colon = strchr(value, ':');

    if (!colon) {
        lb_fail(err, LB_E_USAGE, "\"%.80s\" is not NAME: VALUE", value);
        return NULL;
    }
    *colon = '\0';
    *name = trim(value);
    return check_word(*name, err) ? NULL : trim(colon + 1);
}

static struct lb_vm_rule *add_rule(struct lb_vm_rules *rules, const char *name)
{
    rules->v = lb_realloc(rules->v, (rules->n + 1) * sizeof(*rules->v));
    rules->v[rules->n] = (struct lb_vm_rule){.name = lb_strdup(name)};
    return &rules->v[rules->n++];
}

/* A second line of the same name adds to the first. */
static int add_list(struct lb_vm_rules *rules, char *value, struct lb_error *err)
{
    char *name, *item, *rest = split_rule(value, &name, err);
    struct lb_vm_rule *r = NULL;

    if (!rest)
        return -1;
    for (unsigned i = 0; i < rules->n && !r; i++)
        r = strcmp(rules->v[i].name, name) ? NULL : &rules->v[i];
    if (!r)
        r = add_rule(rules, name);
    if (!*rest)
        return lb_fail(err, LB_E_USAGE, "nothing follows \"%.80s:\"", name);
    while ((item = strsep(&rest, ","))) {
        item = trim(item);
        if (check_word(item, err))
            return -1;
        add_item(&r->items, item);
    }
    return 0;
}

static int set_together(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_list(&c->together, value, err);
}

static int set_apart(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_list(&c->apart, value, err);
}

static int set_require_tag(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_list(&c->require_tags, value, err);
}

static int set_forbid_tag(struct lb_host_config *c, char *value, struct lb_error *err)
{
    return add_list(&c->forbid_tags, value, err);
}

static int set_priority(struct lb_host_config *c, char *value, struct lb_error *err)
{
    char *name, *number = split_rule(value, &name, err), *end;
    long n;

    if (!number)
        return -1;
    n = strtol(number, &end, 10);
    if (end == number || *end || n < 0 || n > MAX_PRIORITY)
        return lb_fail(err, LB_E_USAGE, "a priority is a number from 0 to %d", MAX_PRIORITY);
    for (unsigned i = 0; i < c->priorities.n; i++)
        if (!strcmp(c->priorities.v[i].name, name))
            return lb_fail(err, LB_E_USAGE, "%s has a priority already", name);
    add_rule(&c->priorities, name)->priority = (uint32_t)n;
    return 0;
}

static int set_directory(struct lb_host_config *c, char *value, struct lb_error *err)
{
    if (strncmp(value, "etcd:", 5) || !value[5]) {
        lb_fail(err, LB_E_USAGE, "\"%.200s\" is no directory of hosts", value);
        return lb_remedy(err, "give etcd:URL[,URL...]");
    }
    return copy_value(c->directory, sizeof(c->directory), value, err);
}

const char *lb_config_directory(const struct lb_host_config *c)
{
    if (c->directory[0])
        return c->directory;
    return strncmp(c->witness, "etcd:", 5) ? NULL : c->witness;
}

bool lb_vm_matches(const char *pattern, const char *vm)
{
    return fnmatch(pattern, vm, 0) == 0;
}

uint32_t lb_config_priority(const struct lb_host_config *c, const char *vm)
{
    for (unsigned i = 0; i < c->priorities.n; i++)
        if (!strcmp(c->priorities.v[i].name, vm))
            return c->priorities.v[i].priority;
    for (unsigned i = 0; i < c->priorities.n; i++)
        if (lb_vm_matches(c->priorities.v[i].name, vm))
            return c->priorities.v[i].priority;
    return 0;
}

static const struct key {
    const char *name;
    bool repeats;
    set_fn *set;
} keys[] = {
    {"listen", false, set_listen},
    {"name", false, set_name},
    {"emulator", true, set_emulator},
    {"path", true, set_path},
    {"tap", true, set_tap},
    {"memory-reserve", false, set_reserve},
    {"bandwidth", false, set_bandwidth},
    {"max-downtime", false, set_downtime},
    {"channels", false, set_channels},
    {"compress", false, set_compress},
    {"throttle", false, set_throttle},
    {"witness", false, set_witness},
    {"backup", false, set_backup},
    {"lease", false, set_lease},
    {"checkpoint-dir", false, set_checkpoint_dir},
    {"checkpoint-key", false, set_checkpoint_key},
    {"checkpoint-level", false, set_checkpoint_level},
    {"tag", true, set_tag},
    {"link", false, set_link},
    {"together", true, set_together},
    {"apart", true, set_apart},
    {"require-tag", true, set_require_tag},
    {"forbid-tag", true, set_forbid_tag},
    {"vm-priority", true, set_priority},
    {"directory", false, set_directory},
};

static const struct key *find_key(const char *name)
{
    for (size_t i = 0; i < LB_ARRAY_LEN(keys); i++)
        if (!strcmp(keys[i].name, name))
            return &keys[i];
    return NULL;
}

static void defaults(struct lb_host_config *c)
{
    memset(c, 0, sizeof(*c));
    snprintf(c->listen, sizeof(c->listen), ":%d", LB_DEFAULT_PORT);
    if (gethostname(c->name, sizeof(c->name) - 1) < 0 || !c->name[0])
        snprintf(c->name, sizeof(c->name), "localhost");
    c->memory_reserve_bytes = UINT64_C(256) << 20;
    c->max_downtime_ms = 300;
    snprintf(c->compress, sizeof(c->compress), "auto");
    c->throttle = true;
}

/* A comment starts with # at the beginning of the line or after a blank, so that
 * a file name may contain one. */
static void cut_comment(char *line)
{
    for (char *p = line; (p = strchr(p, '#')); p++) {
        if (p == line || p[-1] == ' ' || p[-1] == '\t') {
            *p = '\0';
            return;
        }
    }
}

static int parse_line(struct lb_host_config *c, char *line, uint64_t *seen, struct lb_error *err)
{
    cut_comment(line);
    line = trim(line);
    if (!*line)
        return 0;
    char *eq = strchr(line, '=');
    if (!eq) {
        lb_fail(err, LB_E_USAGE, "\"%s\" is not key = value", line);
        return lb_remedy(err, "%s", remedy_keys);
    }
    *eq = '\0';
    char *name = trim(line), *value = trim(eq + 1);
    const struct key *k = find_key(name);
    if (!k) {
        lb_fail(err, LB_E_USAGE, "unknown key \"%s\"", name);
        return lb_remedy(err, "%s", remedy_keys);
    }
    uint64_t bit = UINT64_C(1) << (k - keys);
    if (!*value)
        return lb_fail(err, LB_E_USAGE, "%s has no value", name);
    if (!k->repeats && (*seen & bit))
        return lb_fail(err, LB_E_USAGE, "%s is given twice", name);
    *seen |= bit;
    if (k->set(c, value, err) < 0)
        return lb_context(err, "%s", name);
    return 0;
}

int lb_config_load(const char *path, struct lb_host_config *out, struct lb_error *err)
{
    struct lb_host_config c;
    struct lb_error why = LB_ERROR_INIT;
    LB_AUTO_FREE char *text = NULL;
    size_t len = 0;
    uint64_t seen = 0;
    unsigned line_no = 0;

    defaults(&c);
    if (path && lb_file_read(path, MAX_CONFIG_BYTES, &text, &len, &why) < 0) {
        if (why.sys_errno != ENOENT || strcmp(path, LB_CONFIG_DEFAULT_PATH)) {
            if (err)
                *err = why;
            if (err && !err->remedy[0])
                lb_remedy(err, "check the file given with --config");
            return -1;
        }
    }
    if (text && strlen(text) != len)
        return lb_fail(err, LB_E_USAGE, "%s is not a text file", path);
    for (char *line = text; line && *line;) {
        char *next = strchr(line, '\n');
        if (next)
            *next++ = '\0';
        line_no++;
        if (parse_line(&c, line, &seen, err) < 0) {
            lb_config_free(&c);
            return lb_context(err, "%s:%u", path, line_no);
        }
        line = next;
    }
    *out = c;
    return 0;
}

static void free_maps(struct lb_path_map *v, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        free(v[i].from);
        free(v[i].to);
    }
    free(v);
}

static void free_rules(struct lb_vm_rules *rules)
{
    for (unsigned i = 0; i < rules->n; i++) {
        free(rules->v[i].name);
        lb_strv_free(rules->v[i].items);
    }
    free(rules->v);
}

void lb_config_free(struct lb_host_config *c)
{
    if (!c)
        return;
    free_maps(c->emulators, c->n_emulators);
    free_maps(c->paths, c->n_paths);
    free_maps(c->taps, c->n_taps);
    lb_strv_free(c->tags);
    free_rules(&c->together);
    free_rules(&c->apart);
    free_rules(&c->require_tags);
    free_rules(&c->forbid_tags);
    free_rules(&c->priorities);
    memset(c, 0, sizeof(*c));
}

char *lb_map_path(const struct lb_path_map *maps, unsigned n, const char *path)
{
    const struct lb_path_map *best = NULL;
    size_t best_len = 0;

    for (unsigned i = 0; i < n; i++) {
        size_t len = strlen(maps[i].from);
        while (len > 1 && maps[i].from[len - 1] == '/') /* "/run/vm/" is "/run/vm" */
            len--;
        bool whole = path[0] && !strncmp(path, maps[i].from, len) &&
                     (path[len] == '\0' || path[len] == '/' || maps[i].from[len - 1] == '/');
        if (whole && len > best_len) {
            best = &maps[i];
            best_len = len;
        }
    }
    if (!best)
        return lb_strdup(path);
    const char *rest = path + best_len;
    size_t to_len = strlen(best->to);
    while (to_len > 1 && best->to[to_len - 1] == '/')
        to_len--;
    if (to_len == 1 && *rest == '/') /* "/" + "/x" */
        to_len = 0;
    return lb_asprintf("%.*s%s%s", (int)to_len, best->to,
                       *rest && *rest != '/' && to_len > 0 && best->to[to_len - 1] != '/' ? "/" : "", rest);
}

const char *lb_map_name(const struct lb_path_map *maps, unsigned n, const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(maps[i].from, name))
            return maps[i].to;
    return name;
}
