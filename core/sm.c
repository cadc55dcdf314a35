/* core/sm.c - state machines as tables. */
#include "core/core.h"

#include <assert.h>
#include <string.h>

void lb_sm_init(struct lb_sm *sm, const char *what, const struct lb_sm_state *table,
                unsigned n_states, unsigned initial)
{
    assert(table && n_states > 0 && n_states <= 64 && initial < n_states);
    for (unsigned i = 0; i < n_states; i++) {
        assert(table[i].name);
        /* a move to a state that does not exist is a typing error in the table */
        assert(n_states == 64 || (table[i].allowed >> n_states) == 0);
    }
    memset(sm, 0, sizeof(*sm));
    sm->table = table;
    sm->n_states = n_states;
    sm->state = initial;
    sm->what = what;
}

bool lb_sm_may(const struct lb_sm *sm, unsigned to)
{
    return to < sm->n_states && (sm->table[sm->state].allowed & LB_SM_TO(to));
}

const char *lb_sm_name(const struct lb_sm *sm)
{
    return sm->table[sm->state].name;
}

void lb_sm_move(struct lb_sm *sm, unsigned to)
{
    unsigned from = sm->state;

    if (!lb_sm_may(sm, to)) /* the one line that explains the abort below */
        lb_log(LB_LOG_ERROR, "%s: illegal move %s -> %s", sm->what, sm->table[from].name,
               to < sm->n_states ? sm->table[to].name : "(no such state)");
    assert(lb_sm_may(sm, to));
    sm->state = to;
    lb_log(LB_LOG_DEBUG, "%s: %s -> %s", sm->what, sm->table[from].name, sm->table[to].name);
    if (sm->invariant)
        sm->invariant(sm, sm->arg);
    if (sm->on_move)
        sm->on_move(sm, from, sm->arg);
}
