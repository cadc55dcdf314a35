/*
 * core/json.h - fields of the JSON files that are ours (jansson does the rest). Any thread.
 */
#ifndef LB_JSON_H
#define LB_JSON_H

#include <jansson.h>

#include "core/core.h"

/* A string of any bytes: names, reasons of peers and hypervisors may hold anything, a character cut in the
 * middle too, but JSON only takes UTF-8; then every byte outside ASCII becomes '?'. NULL: "". */
json_t *lb_json_text(const char *s);

/* -1: missing, of another kind, or too long (cap counts the NUL) or too big; *out is then as it was. */
int lb_json_get_string(const json_t *o, const char *key, char *out, size_t cap);
int lb_json_get_u64(const json_t *o, const char *key, uint64_t max, uint64_t *out);

#endif
