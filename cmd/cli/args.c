/* cmd/cli/args.c - what the arguments of subcommands have in common. */
#include "cmd/cli/cli.h"

#include <string.h>

enum { OPT_JSON = 1000, OPT_FORCE, OPT_LIMIT };

static error_t parse_json(int key, char *arg, struct argp_state *state)
{
    struct lb_cli *cli = state->input;

    (void)arg;
    if (key != OPT_JSON)
        return ARGP_ERR_UNKNOWN;
    cli->json = true;
    return 0;
}

static const struct argp_option json_options[] = {
    {"json", OPT_JSON, NULL, 0, "Print the answer as one JSON object", 0},
    {0},
};
const struct argp lb_json_argp = {json_options, parse_json, NULL, NULL, NULL, NULL, NULL};

void lb_parse(const char *cmd, const struct argp *argp, unsigned flags, int argc, char **argv,
              void *input)
{
    LB_AUTO_FREE char *name = lb_asprintf("lifeboat %s", cmd);
    char *old = argv[0];

    argv[0] = name;
    /* argp exits by itself: with 0 after --help, with 2 when the arguments are wrong */
    if (argp_parse(argp, argc, argv, flags, NULL, input))
        exit(LB_E_USAGE);
    argv[0] = old;
}

bool lb_arg_number(const char *s, unsigned long min, unsigned long max, unsigned long *out)
{
    char *end;

    if (s[0] < '0' || s[0] > '9')
        return false;
    *out = strtoul(s, &end, 10);
    return !*end && *out >= min && *out <= max;
}

void lb_arg_word(char *arg, struct argp_state *state, char **first, char **second)
{
    if (!*first)
        *first = arg;
    else if (second && !*second)
        *second = arg;
    else
        argp_error(state, "unexpected argument \"%s\"", arg);
}

uint64_t lb_arg_duration(const char *arg, uint64_t unit_ms, const char *option,
                         struct argp_state *state)
{
    struct lb_error err = LB_ERROR_INIT;
    unsigned long n = 0;
    uint64_t ms = 0;

    if (lb_arg_number(arg, 1, UINT32_MAX / unit_ms, &n))
        return n * unit_ms;
    if (lb_parse_duration_ms(arg, &ms, &err))
        argp_error(state, "%s: %s; %s", option, err.message, err.remedy);
    else if (ms < 1 || ms > UINT32_MAX)
        argp_error(state, "%s: \"%s\" is out of range", option, arg);
    return ms;
}

uint64_t lb_arg_rate(const char *arg, struct argp_state *state)
{
    struct lb_error err = LB_ERROR_INIT;
    uint64_t bytes_per_s = 0;

    if (lb_parse_rate(arg, &bytes_per_s, &err))
        argp_error(state, "--bandwidth: %s; %s", err.message, err.remedy);
    else if (bytes_per_s < 1000)
        argp_error(state, "--bandwidth: less than 1 kB per second is of no use");
    return bytes_per_s;
}

uint32_t lb_arg_transport(const char *arg, struct argp_state *state)
{
    static const char *const names[] = {"auto", "tcp", "rdma"};

    for (uint32_t i = 0; i < LB_ARRAY_LEN(names); i++)
        if (!strcmp(arg, names[i]))
            return i;
    argp_error(state, "--transport takes auto, tcp or rdma");
    return 0;
}

int lb_arg_level(const char *arg, struct argp_state *state)
{
    unsigned long n = 0;
    bool minus = arg[0] == '-';

    if (!lb_arg_number(arg + minus, 1, minus ? 7 : 19, &n))
        argp_error(state, "--level takes a number from -7 to -1 or from 1 to 19");
    return minus ? -(int)n : (int)n;
}

uint32_t lb_arg_parallel(const char *arg, struct argp_state *state)
{
    unsigned long n = 0;

    if (strcmp(arg, "auto") && !lb_arg_number(arg, 1, 1000, &n))
        argp_error(state, "--parallel takes auto, or a number from 1 to 1000");
    return (uint32_t)n;
}

unsigned lb_arg_hot(const char *arg, struct argp_state *state)
{
    static const char *const names[] = {"throttle", "suspend", "leave"};

    for (unsigned i = 0; i < LB_ARRAY_LEN(names); i++)
        if (!strcmp(arg, names[i]))
            return i;
    argp_error(state, "--hot takes throttle, suspend or leave");
    return 0;
}

struct name_parse {
    struct lb_name_args *out;
    unsigned flags;
};

static error_t parse_name(int key, char *arg, struct argp_state *state)
{
    struct name_parse *p = state->input;
    uint64_t limit;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = p->out->cli;
        return 0;
    case OPT_FORCE:
        p->out->force = true;
        return 0;
    case OPT_LIMIT:
        if (lb_parse_size(arg, &limit, NULL) || limit < 1 || limit > 1000)
            argp_error(state, "--limit takes a number from 1 to 1000");
        p->out->limit = (uint32_t)limit;
        return 0;
    case ARGP_KEY_ARG:
        if (p->out->name || (p->flags & LB_NAME_NONE))
            argp_error(state, "unexpected argument \"%s\"", arg);
        p->out->name = arg;
        return 0;
    case ARGP_KEY_END:
        if (!p->out->name && !(p->flags & (LB_NAME_OPTIONAL | LB_NAME_NONE)))
            argp_error(state, "NAME is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

void lb_parse_name(struct lb_cli *cli, const struct lb_cmd *cmd, const char *doc, unsigned flags,
                   const char *force, int argc, char **argv, struct lb_name_args *out)
{
    struct argp_option options[3] = {{0}};
    const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    /* glibc leaks when it prints an empty table */
    const struct argp argp = {flags & (LB_NAME_FORCE | LB_NAME_LIMIT) ? options : NULL,
                              parse_name, cmd->args, doc, children, NULL, NULL};
    struct name_parse p = {out, flags};
    unsigned n = 0;

    if (flags & LB_NAME_FORCE)
        options[n++] = (struct argp_option){"force", OPT_FORCE, NULL, 0, force, 0};
    if (flags & LB_NAME_LIMIT)
        options[n++] = (struct argp_option){"limit", OPT_LIMIT, "N", 0,
                                            "At most N records, the newest (default 50)", 0};
    *out = (struct lb_name_args){.cli = cli};
    lb_parse(cmd->name, &argp, 0, argc, argv, &p);
}
