/*
 * core/registry.h - the VMs this host knows, as files.
 *
 * STATE_DIR/
 *   identity.key, hosts.json         who we are, whom we trust (netproto)
 *   vms/NAME/vm.json                 one registry entry; written atomically
 *   vms/NAME/remus.json              protection: which side we are, who else (remus/record.h)
 *   vms/NAME/protect.json            that it is to be protected, and how (remus/record.h)
 *   vms/NAME/schedule.json            how often to take checkpoints (checkpoint/checkpoint.h)
 *   checkpoints/VM/...               checkpoints (checkpoint/catalog.h)
 *   vms/NAME/lock                    locked by the session that works on the VM
 *   vms/NAME/{qmp.sock,qemu.log,...} private directory of the VM ("run_dir")
 *   handover/TOKEN.json, TOKEN.lock  hand-over journals (migrate/journal.h)
 *   history.jsonl                    one line per ended migration
 *   dirty.json, links.json           what was measured for plans of evacuations (migrate/capacity.h)
 *   maintenance.json                 this host takes no VMs; which have left (migrate/maintenance.h)
 *   evacuation.json                  how far this host is emptied (migrate/evacuate.h)
 *   sessions.sock                    where session processes report to the supervisor
 *   log/SESSION.log                  one log per session
 *
 * The files are the truth; the supervisor keeps no other copy, so it can be
 * killed at any moment.  An entry is written by whoever holds its lock, or by
 * the supervisor when nobody does.
 */
#ifndef LB_REGISTRY_H
#define LB_REGISTRY_H

#include "core/core.h"

enum lb_vm_state {
    LB_VM_RUNNING = 0,      /* guest runs here (or was stopped by its operator) */
    LB_VM_MIGRATING_OUT,    /* a session works on it; still ours */
    LB_VM_INCOMING,         /* receiver: not a VM yet */
    LB_VM_HANDED_OVER,      /* paused here; only the destination's journal decides */
    LB_VM_DEAD,             /* the process is gone */
    LB_VM_PROTECTED,        /* runs here, a backup follows it: vms/NAME/remus.json (remus/record.h) */
    LB_VM_STANDBY,          /* the backup of a VM that runs elsewhere: not a VM yet */
    LB_VM_CHECKPOINTING,    /* a session takes a checkpoint or suspends it; ours, perhaps paused */
    LB_VM_SUSPENDED,        /* no process: the file `checkpoint` is the VM */
    LB_VM_RESTORING,        /* receiver, fed from `checkpoint`: not a VM yet */
    LB_VM_FILLING,          /* runs here; its memory still comes from `checkpoint` */
};
const char *lb_vm_state_name(enum lb_vm_state s);
int lb_vm_state_parse(const char *name, enum lb_vm_state *out);

#define LB_CAME_BY_BYTES 560 /* of eight hosts */

struct lb_vm_entry {
    char name[128];          /* [A-Za-z0-9][A-Za-z0-9._-]{0,62} */
    char hypervisor[16];     /* "qemu" */
    struct lb_proc_id proc;
    char qmp_path[256];
    char origin[16];         /* "run" | "adopted" | "migrated" */
    enum lb_vm_state state;
    char token[33];          /* hex, of the hand-over in progress; "" otherwise */
    char peer[128];          /* host name of the other side; "" otherwise */
    uint64_t created_ms, changed_ms;  /* wall clock */
    char note[256];          /* last remarkable thing, for status */
    /* Keys of the hosts that ran it before, blanks between them, the latest last; "" none. The ones that may ask
     * for it back. */
    char came_by[LB_CAME_BY_BYTES];
    char checkpoint[160];    /* "VM@7" (checkpoint/catalog.h) of the last four states, or the last one taken; "" */
};

bool lb_vm_name_valid(const char *name);
/* Is the key in the list? Put it at its end; the oldest go when there is no room. */
bool lb_came_by_has(const char *list, const char *key);
void lb_came_by_add(char list[LB_CAME_BY_BYTES], const char *key);
/* STATE_DIR/vms/NAME; created 0700 when make. Caller frees. */
char *lb_vm_dir(const char *state_dir, const char *name, bool make);
int lb_vm_entry_load(const char *state_dir, const char *name, struct lb_vm_entry *out,
                     struct lb_error *err);               /* LB_E_NOT_FOUND */
int lb_vm_entry_save(const char *state_dir, const struct lb_vm_entry *e, struct lb_error *err);
/* Forget NAME: its directory goes too, except the files of a process that still lives.
 * Missing is success. The caller holds the lock, which ends with this. */
int lb_vm_entry_remove(const char *state_dir, const char *name, struct lb_error *err);
/* Sorted by name; *v malloc'ed. Broken entries are logged and left out. */
int lb_vm_entry_list(const char *state_dir, struct lb_vm_entry **v, unsigned *n,
                     struct lb_error *err);
#define LB_VM_QMP_SOCK "qmp.sock"
/* vms/NAME/qmp.sock: the control socket of what was launched for that VM; caller frees. */
char *lb_vm_qmp_path(const char *state_dir, const char *name);
/* Take vms/NAME/lock without waiting; returns an fd that holds it, or -1 with
 * LB_E_STATE "VM NAME is busy: a session works on it" . Freed by close or death. */
int lb_vm_lock(const char *state_dir, const char *name, struct lb_error *err);
/* Take the lock of a VM, waiting for a moment: a status query holds it for milliseconds. */
int lb_vm_lock_patiently(const char *state_dir, const char *name, unsigned wait_ms,
                         struct lb_error *err);
bool lb_vm_is_locked(const char *state_dir, const char *name);

#endif
