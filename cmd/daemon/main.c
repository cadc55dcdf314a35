/* cmd/daemon/main.c - lifeboatd: options, then the supervisor or a session. */
#include "cmd/daemon/daemon.h"

#include <argp.h>
#include <signal.h>
#include <string.h>

enum { OPT_STATE_DIR = 256, OPT_SOCKET, OPT_LISTEN, OPT_CONFIG, OPT_LOG_LEVEL, OPT_FOREGROUND };

static const struct argp_option options[] = {
    {"state-dir", OPT_STATE_DIR, "DIR", 0, "Durable state (default " LB_DEFAULT_STATE_DIR ")", 0},
    {"socket", OPT_SOCKET, "PATH", 0, "Socket for the CLI (default " LB_DEFAULT_SOCKET ")", 0},
    {"listen", OPT_LISTEN, "HOST:PORT", 0,
     "Address for other hosts (default: the configuration's, else :7007); \"none\" accepts nobody",
     0},
    {"config", OPT_CONFIG, "FILE", 0, "Configuration (default " LB_CONFIG_DEFAULT_PATH ")", 0},
    {"log-level", OPT_LOG_LEVEL, "LEVEL", 0, "error, warn, info (default), debug or trace", 0},
    {"foreground", OPT_FOREGROUND, NULL, 0, "Stay in the foreground (always the case)", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct daemon_options *o = state->input;

    switch (key) {
    case OPT_STATE_DIR:
        o->state_dir = arg;
        return 0;
    case OPT_SOCKET:
        o->socket = arg;
        return 0;
    case OPT_LISTEN:
        o->listen = arg;
        return 0;
    case OPT_CONFIG:
        o->config_path = arg;
        return 0;
    case OPT_LOG_LEVEL:
        if (lb_log_parse_level(arg, &o->log_level))
            argp_error(state, "\"%s\" is not a log level", arg);
        return 0;
    case OPT_FOREGROUND:
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* Processes that outlive a change of directory get absolute names. */
static char *absolute(const char *path)
{
    LB_AUTO_FREE char *cwd = path[0] == '/' ? NULL : realpath(".", NULL);

    return cwd ? lb_asprintf("%s/%s", cwd, path) : lb_strdup(path);
}

int main(int argc, char **argv)
{
    struct daemon_options o = {.log_level = LB_LOG_INFO};
    struct lb_error err = LB_ERROR_INIT;
    const struct argp argp = {options, parse, NULL,
                              "lifeboatd - keeps the virtual machines of this host and talks to "
                              "other hosts\vSee lifeboatd(8).",
                              NULL, NULL, NULL};

    signal(SIGPIPE, SIG_IGN);
    if (argc >= 2 && !strcmp(argv[1], "--session"))
        return lb_session_main();

    argp_program_version = "lifeboatd " LB_VERSION;
    argp_err_exit_status = LB_E_USAGE;
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    lb_log_set_level(o.log_level);
    o.state_dir = absolute(o.state_dir ? o.state_dir : LB_DEFAULT_STATE_DIR);
    o.socket = absolute(o.socket ? o.socket : LB_DEFAULT_SOCKET);
    o.config_path = absolute(o.config_path ? o.config_path : LB_CONFIG_DEFAULT_PATH);
    if (!lb_daemon_run(&o, &err))
        return 0;
    fprintf(stderr, "lifeboatd: %s\n", err.message);
    if (err.remedy[0])
        fprintf(stderr, "  remedy: %s\n", err.remedy);
    return lb_errcode_exit(err.code);
}
