/* cmd/cli/main.c - lifeboat: find the subcommand and run it. */
#include "cmd/cli/cli.h"

#include <signal.h>
#include <string.h>

static const struct lb_cmd *const cmds[] = {
    &lb_cmd_run,    &lb_cmd_adopt,  &lb_cmd_release, &lb_cmd_ls,        &lb_cmd_status,
    &lb_cmd_show,   &lb_cmd_stop,   &lb_cmd_migrate, &lb_cmd_preflight, &lb_cmd_cancel,
    &lb_cmd_recover, &lb_cmd_history, &lb_cmd_protect, &lb_cmd_unprotect, &lb_cmd_failover,
    &lb_cmd_top,    &lb_cmd_suspend, &lb_cmd_resume, &lb_cmd_checkpoint, &lb_cmd_restore,
    &lb_cmd_clone,  &lb_cmd_evacuate, &lb_cmd_maintenance, &lb_cmd_plan,  &lb_cmd_ask,
    &lb_cmd_host,
};

static struct lb_cli cli;

struct top {
    const struct lb_cmd *cmd;
    int at; /* index of the subcommand's name */
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct top *t = state->input;

    switch (key) {
    case 'H':
        cli.socket = arg;
        return 0;
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &cli;
        return 0;
    case ARGP_KEY_ARG:
        for (size_t i = 0; i < LB_ARRAY_LEN(cmds); i++)
            if (!strcmp(arg, cmds[i]->name))
                t->cmd = cmds[i];
        if (!t->cmd)
            argp_error(state, "there is no subcommand \"%s\"", arg);
        t->at = state->next - 1;
        state->next = state->argc; /* the rest is the subcommand's */
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static char *help_filter(int key, const char *text, void *input)
{
    char *buf = NULL;
    size_t len;
    FILE *f;

    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC)
        return (char *)text;
    f = open_memstream(&buf, &len);
    fprintf(f, "Subcommands:\n");
    for (size_t i = 0; i < LB_ARRAY_LEN(cmds); i++)
        fprintf(f, "  %-11s %s\n", cmds[i]->name, cmds[i]->summary);
    fprintf(f, "\n%s", text);
    fclose(f);
    return buf;
}

/* Wrong arguments end in exit(2) inside argp: --json still gets its object. */
static void on_usage_exit(int status, void *arg)
{
    (void)arg;
    if (status != LB_E_USAGE || !cli.json || cli.reported)
        return;
    puts("{\"error\":{\"code\":\"usage\",\"message\":\"wrong arguments, see standard error\","
         "\"remedy\":\"lifeboat SUBCOMMAND --help\"}}");
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"host", 'H', "SOCKET", 0,
         "Socket of the lifeboatd to talk to (default $LIFEBOAT_SOCKET, else " LB_DEFAULT_SOCKET
         ")", 0},
        {0},
    };
    static const struct argp_child children[] = {{&lb_json_argp, 0, NULL, 0}, {0}};
    const struct argp argp = {
        options, parse, "SUBCOMMAND [ARGUMENTS...]",
        "lifeboat - move running virtual machines between hosts, protect them, keep them on disk\v"
        "`lifeboat SUBCOMMAND --help` explains one; manual pages: lifeboat(1), "
        "lifeboat-SUBCOMMAND(1).",
        children, help_filter, NULL};
    struct top t = {0};

    signal(SIGPIPE, SIG_IGN);
    cli.socket = getenv("LIFEBOAT_SOCKET");
    argp_program_version = "lifeboat " LB_VERSION;
    argp_err_exit_status = LB_E_USAGE;
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        cli.json |= !strcmp(argv[i], "--json");
    on_exit(on_usage_exit, NULL);
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, &t) || !t.cmd)
        return LB_E_USAGE;
    if (!cli.socket || !cli.socket[0])
        cli.socket = LB_DEFAULT_SOCKET;
    return t.cmd->run(&cli, argc - t.at, argv + t.at);
}
