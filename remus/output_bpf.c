/* remus/output_bpf.c - the classifiers of the outside hold, as instructions.
 *
 * All fit on a page, need no compiler for BPF at build time and no library at run time. They use what every kernel
 * since 5.5 has: values of an array map by address, maps that can be mapped, bpf_redirect.
 * The gate is compared in the guest's tap itself, the last place that a released frame passes. */
#include "remus/output_internal.h"

#include <errno.h>
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define TCX_INGRESS 46 /* enum bpf_attach_type since 6.6, not in older headers */

_Static_assert(sizeof(struct lb_gate) == 16, "the gate's programs know its layout");

static long bpf(int cmd, union bpf_attr *attr)
{
    return syscall(__NR_bpf, cmd, attr, sizeof(*attr));
}

int lb_bpf_gate(int *fd, struct lb_gate **gate, struct lb_error *err)
{
    union bpf_attr a;
    memset(&a, 0, sizeof(a));
    a.map_type = BPF_MAP_TYPE_ARRAY;
    a.key_size = sizeof(uint32_t);
    a.value_size = sizeof(struct lb_gate);
    a.max_entries = 1;
    a.map_flags = BPF_F_MMAPABLE;
    memcpy(a.map_name, "lifeboat_gate", sizeof("lifeboat_gate"));
    int map = (int)bpf(BPF_MAP_CREATE, &a);
    if (map < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "no BPF map for the output gate");
        return lb_remedy(err, "the kernel needs CONFIG_BPF_SYSCALL, lifeboatd CAP_BPF or CAP_SYS_ADMIN");
    }
    void *p = mmap(NULL, sizeof(struct lb_gate), PROT_READ | PROT_WRITE, MAP_SHARED, map, 0);
    if (p == MAP_FAILED) {
        int e = errno;
        close(map);
        return lb_fail_errno(err, LB_E_UNSUPPORTED, e, "the output gate cannot be mapped");
    }
    *fd = map;
    *gate = p;
    return 0;
}

void lb_bpf_gate_unmap(struct lb_gate *gate)
{
    if (gate)
        munmap(gate, sizeof(*gate));
}

/* ------------------------------------------------------------ instructions */

#define INSN(c, d, s, o, i) \
    ((struct bpf_insn){.code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i)})
#define MOV_REG(d, s) INSN(BPF_ALU64 | BPF_MOV | BPF_X, d, s, 0, 0)
#define MOV_IMM(d, i) INSN(BPF_ALU64 | BPF_MOV | BPF_K, d, 0, 0, i)
#define MOV32_IMM(d, i) INSN(BPF_ALU | BPF_MOV | BPF_K, d, 0, 0, i)
#define LOAD(size, d, s, o) INSN(BPF_LDX | BPF_MEM | (size), d, s, o, 0)
#define STORE(size, d, s, o) INSN(BPF_STX | BPF_MEM | (size), d, s, o, 0)
#define ADD_SHARED64(d, s, o) INSN(BPF_STX | BPF_ATOMIC | BPF_DW, d, s, o, BPF_ADD)
#define JUMP_EQ(d, s, o) INSN(BPF_JMP | BPF_JEQ | BPF_X, d, s, o, 0)
#define JUMP_GE(d, s, o) INSN(BPF_JMP | BPF_JGE | BPF_X, d, s, o, 0)
#define CALL(f) INSN(BPF_JMP | BPF_CALL, 0, 0, 0, f)
#define EXIT() INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
/* The address of a map's first value: two slots. */
#define LOAD_VALUE(d, map) \
    INSN(BPF_LD | BPF_DW | BPF_IMM, d, BPF_PSEUDO_MAP_VALUE, 0, map), INSN(0, 0, 0, 0, 0)

enum { R0, R1, R2, R3, R6 = 6, R7 };
#define MARK ((int16_t)offsetof(struct __sk_buff, mark))

static int load(const char *name, const struct bpf_insn *insns, size_t n, struct lb_error *err)
{
    union bpf_attr a;
    memset(&a, 0, sizeof(a));
    a.prog_type = BPF_PROG_TYPE_SCHED_CLS;
    a.insns = (uint64_t)(uintptr_t)insns;
    a.insn_cnt = (uint32_t)n;
    a.license = (uint64_t)(uintptr_t) "Dual BSD/GPL";
    memcpy(a.prog_name, name, strlen(name));
    int fd = (int)bpf(BPF_PROG_LOAD, &a);
    if (fd < 0) {
        lb_fail_errno(err, LB_E_UNSUPPORTED, errno, "the kernel refuses the BPF program %s", name);
        lb_remedy(err, "the kernel needs CONFIG_BPF_SYSCALL, lifeboatd CAP_BPF and CAP_NET_ADMIN");
    }
    return fd;
}

int lb_bpf_prog_hold(uint32_t mark, int hold_ifindex, int gate_fd, struct lb_error *err)
{
    const struct bpf_insn insns[] = {
        MOV_REG(R6, R1),
        LOAD(BPF_W, R2, R6, MARK),
        MOV32_IMM(R3, (int32_t)mark),
        JUMP_EQ(R2, R3, 5),
        /* the guest's: out of the holding tap, which lets nothing else out */
        STORE(BPF_W, R6, R3, MARK),
        MOV_IMM(R1, hold_ifindex),
        MOV_IMM(R2, 0),
        CALL(BPF_FUNC_redirect),
        EXIT(),
        /* ours: released */
        MOV_IMM(R1, 0),
        STORE(BPF_W, R6, R1, MARK),
        CALL(BPF_FUNC_ktime_get_ns),
        LOAD_VALUE(R7, gate_fd),
        LOAD(BPF_DW, R1, R7, offsetof(struct lb_gate, until_ns)),
        JUMP_GE(R0, R1, 2),
        MOV_IMM(R0, TC_ACT_UNSPEC), /* the filters after ours, then the port */
        EXIT(),
        /* too late */
        MOV_IMM(R1, 1),
        ADD_SHARED64(R7, R1, offsetof(struct lb_gate, dropped)),
        MOV_IMM(R0, TC_ACT_SHOT),
        EXIT(),
    };
    return load("lifeboat_hold", insns, LB_ARRAY_LEN(insns), err);
}

int lb_bpf_prog_mark(uint32_t mark, struct lb_error *err)
{
    const struct bpf_insn insns[] = {
        MOV32_IMM(R2, (int32_t)mark),
        STORE(BPF_W, R1, R2, MARK),
        MOV_IMM(R0, -1), /* a match: the filter's action follows */
        EXIT(),
    };
    return load("lifeboat_mark", insns, LB_ARRAY_LEN(insns), err);
}

int lb_bpf_prog_only(uint32_t mark, struct lb_error *err)
{
    const struct bpf_insn insns[] = {
        LOAD(BPF_W, R2, R1, MARK),
        MOV32_IMM(R3, (int32_t)mark),
        MOV_IMM(R0, TC_ACT_OK),
        JUMP_EQ(R2, R3, 1),
        MOV_IMM(R0, TC_ACT_SHOT),
        EXIT(),
    };
    return load("lifeboat_only", insns, LB_ARRAY_LEN(insns), err);
}

int lb_bpf_prog_id(int prog_fd, uint32_t *id, struct lb_error *err)
{
    struct bpf_prog_info info;
    union bpf_attr a;
    memset(&info, 0, sizeof(info));
    memset(&a, 0, sizeof(a));
    a.info.bpf_fd = (uint32_t)prog_fd;
    a.info.info_len = sizeof(info);
    a.info.info = (uint64_t)(uintptr_t)&info;
    if (bpf(BPF_OBJ_GET_INFO_BY_FD, &a) < 0)
        return lb_fail_errno(err, LB_E_INTERNAL, errno, "no information about a BPF program");
    *id = info.id;
    return 0;
}

int lb_bpf_tcx_count(int ifindex, unsigned *n, struct lb_error *err)
{
    union bpf_attr a;
    memset(&a, 0, sizeof(a));
    a.query.target_fd = (uint32_t)ifindex;
    a.query.attach_type = TCX_INGRESS;
    *n = 0;
    if (bpf(BPF_PROG_QUERY, &a) < 0)
        return errno == EINVAL || errno == EOPNOTSUPP /* a kernel without tcx */
                   ? 0
                   : lb_fail_errno(err, LB_E_INTERNAL, errno, "tcx cannot be queried");
    *n = a.query.prog_cnt;
    return 0;
}
