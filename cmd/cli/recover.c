/* cmd/cli/recover.c - lifeboat recover [NAME] */
#include "cmd/cli/cli.h"

static bool failed;

static void show(const json_t *o)
{
    size_t i;
    json_t *v;

    failed = lb_jbool(o, "failed");
    if (!json_array_size(json_object_get(o, "vms")))
        puts("there is no VM here");
    json_array_foreach (json_object_get(o, "vms"), i, v) {
        const char *text = lb_jstr(v, "text"), *error = lb_jstr(v, "error");

        lb_print_text(stdout, text[0] ? text : lb_jstr(v, "name"));
        putchar('\n');
        if (error[0]) {
            printf("  ");
            lb_print_text(stdout, error);
            putchar('\n');
        }
    }
}

static int run(struct lb_cli *cli, int argc, char **argv)
{
    struct lb_error err = LB_ERROR_INIT;
    Lb__RpcRequest r = LB__RPC_REQUEST__INIT;
    Lb__RpcName m = LB__RPC_NAME__INIT;
    struct lb_name_args a;
    json_t *o;

    lb_parse_name(cli, &lb_cmd_recover,
                  "Decide where a VM runs after a crash, now; without NAME for every VM of this "
                  "host. lifeboatd also does this by itself.",
                  LB_NAME_OPTIONAL, NULL, argc, argv, &a);
    m.name = (char *)(a.name ? a.name : "");
    r.kind_case = LB__RPC_REQUEST__KIND_RECOVER;
    r.recover = &m;
    LB_AUTO_FREE char *text = lb_request(cli, &r, NULL, NULL, -1, &err);
    if (!text)
        return lb_cli_fail(cli, &err);
    o = json_loads(text, 0, NULL);
    if (cli->json) {
        puts(text);
        failed = lb_jbool(o, "failed");
    } else {
        show(o);
    }
    json_decref(o);
    return failed ? lb_errcode_exit(LB_E_UNDECIDED) : 0;
}

const struct lb_cmd lb_cmd_recover = {"recover", "[NAME]", "Decide where VMs run after a crash",
                                      run};
