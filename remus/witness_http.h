/*
 * remus/witness_http.h - one question to several servers at once: the first good answer counts.
 *
 * A thread of its own runs libevent's HTTP client. Every server keeps its connections open between
 * questions, so that a question costs one round trip; a look every LB_HTTP_LOOK_MS keeps them warm and
 * tells whether anybody answers at all. A server that fails, or says nothing for LB_HTTP_TRY_MS, is
 * asked again until the question's deadline or until another one has answered.
 */
#ifndef LB_WITNESS_HTTP_H
#define LB_WITNESS_HTTP_H

#include <jansson.h>

#include "core/core.h"

#define LB_HTTP_LOOK_MS 2000
#define LB_HTTP_TRY_MS 400
#define LB_HTTP_MAX_URLS 16

struct lb_http;
/* urls: "http://HOST[:PORT][,...]". look_path, look_body (JSON): the question of the looks. */
int lb_http_open(const char *urls, uint16_t default_port, const char *look_path,
                 const char *look_body, struct lb_http **out, struct lb_error *err);
/* POST body to path of every server; *answer: the JSON object of the first that said 200 (caller:
 * json_decref). Any thread, blocks until the deadline at most. LB_E_NET: what each of them said. */
int lb_http_ask(struct lb_http *h, const char *path, const char *body, uint64_t deadline_ns,
                json_t **answer, struct lb_error *err);
/* Has the last look, or a question since, been answered? Never blocks. */
bool lb_http_healthy(struct lb_http *h, char why[160]);
/* Nobody may be inside lb_http_ask. */
void lb_http_close(struct lb_http *h);

#endif
