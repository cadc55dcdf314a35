# Lifeboat. `make help` lists the targets; V=1 shows the commands.
MAKEFLAGS += --no-builtin-rules
B        := build
comma    := ,
PREFIX   ?= /usr/local
CC       ?= cc
ifeq ($(origin CC),default)
CC       := cc
endif
CFLAGS   ?= -O2 -g
WARN     := -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 $(if $(WERROR),-Werror)
PKGS     := libevent libevent_pthreads libzstd libsodium libprotobuf-c jansson libxxhash libcrypto libnbd
# RDMA is built in where its libraries are (RDMA=no: not even there)
RDMA_PKGS := libibverbs librdmacm
RDMA     ?= $(shell pkg-config --exists $(RDMA_PKGS) && echo yes)
ifeq ($(RDMA),yes)
PKGS     += $(RDMA_PKGS)
NOT_BUILT := netproto/rdma_none.c
else
NOT_BUILT := netproto/rdma_cm.c netproto/rdma_mem.c netproto/transport_rdma.c
endif
PKG_CFLAGS = $(shell pkg-config --cflags $(PKGS))
PKG_LIBS   = $(shell pkg-config --libs $(PKGS))
# SAN=address,undefined or SAN=thread gives a sanitizer build in its own folder
ifneq ($(SAN),)
O        := $(B)/san-$(subst $(comma),-,$(SAN))
SANFLAGS := -fsanitize=$(SAN) -fno-omit-frame-pointer
else
O        := $(B)
endif
ALL_CFLAGS = -std=c11 -D_GNU_SOURCE -I. -I$(B)/gen $(WARN) $(CFLAGS) $(SANFLAGS) $(PKG_CFLAGS) -pthread -MMD -MP
ALL_LIBS   = $(SANFLAGS) $(PKG_LIBS) -pthread -lm
Q        := $(if $(V),,@)
say       = $(if $(V),,@echo "  $(1)	$(2)")

PROTOS   := $(wildcard netproto/*.proto)
GEN_C    := $(PROTOS:%.proto=$(B)/gen/%.pb-c.c)
GEN_H    := $(PROTOS:%.proto=$(B)/gen/%.pb-c.h)
LIB_SRC  := $(filter-out $(NOT_BUILT),$(wildcard core/*.c core/qemu/*.c core/fake/*.c netproto/*.c checkpoint/*.c migrate/*.c remus/*.c))
LIB_OBJ  := $(LIB_SRC:%.c=$(O)/obj/%.o) $(GEN_C:$(B)/gen/%.c=$(O)/obj/gen/%.o)
CLI_SRC  := $(wildcard cmd/cli/*.c)
DMN_SRC  := $(wildcard cmd/daemon/*.c)
CMN_SRC  := $(wildcard cmd/common/*.c)
CLI_OBJ  := $(CLI_SRC:%.c=$(O)/obj/%.o) $(CMN_SRC:%.c=$(O)/obj/%.o)
DMN_OBJ  := $(DMN_SRC:%.c=$(O)/obj/%.o) $(CMN_SRC:%.c=$(O)/obj/%.o)
UNIT_SRC := $(wildcard tests/unit/test_*.c)
UNIT_BIN := $(UNIT_SRC:tests/unit/%.c=$(O)/tests/unit/%)
INTG_SRC := $(wildcard tests/integration/test_*.c)
INTG_BIN := $(INTG_SRC:tests/integration/%.c=$(O)/tests/integration/%)
TOOL_SRC := $(wildcard tests/tools/*.c)
TOOL_BIN := $(TOOL_SRC:tests/tools/%.c=$(O)/tests/tools/%)

PLUGIN   := $(O)/lifeboat-nbdkit-plugin.so

all: $(O)/lifeboat $(O)/lifeboatd $(PLUGIN)

# On a machine without the packages this is what fails first, and says what is missing (the protocols come before all code).
$(B)/.deps-%: tests/lib/deps.sh
	$(Q)tests/lib/deps.sh --say $* && mkdir -p $(@D) && touch $@
$(O)/lifeboat: $(CLI_OBJ) $(O)/liblifeboat.a
	$(call say,LD,$@)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)
$(O)/lifeboatd: $(DMN_OBJ) $(O)/liblifeboat.a
	$(call say,LD,$@)
	$(Q)$(CC) -o $@ $^ $(ALL_LIBS)
$(O)/liblifeboat.a: $(LIB_OBJ)
	$(call say,AR,$@)
	$(Q)rm -f $@ && ar rcs $@ $^
# nbdkit loads it: no sanitizer in it, whatever the rest is built with
$(PLUGIN): remus/nbdkit/plugin.c remus/nbdkit/wire.h Makefile | $(B)/.deps-build
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) -std=c11 -D_GNU_SOURCE -I. $(WARN) -Wno-missing-prototypes $(CFLAGS) \
		$(shell pkg-config --cflags nbdkit) -fPIC -shared -o $@ $< -pthread
$(O)/obj/%.o: %.c $(GEN_H) Makefile
	$(call say,CC,$<)
	$(Q)mkdir -p $(@D) && $(CC) $(ALL_CFLAGS) -c -o $@ $<
$(O)/obj/gen/%.o: $(B)/gen/%.c
	$(call say,CC,$<)
	$(Q)mkdir -p $(@D) && $(CC) $(ALL_CFLAGS) -w -c -o $@ $<
$(B)/gen/%.pb-c.c $(B)/gen/%.pb-c.h: %.proto | $(B)/.deps-build
	$(call say,PROTOC,$<)
	$(Q)mkdir -p $(@D) && protoc-c --proto_path=. --c_out=$(B)/gen $< 2>$@.log || { cat $@.log >&2; false; } # Debian 13's warns
$(O)/tests/unit/%: tests/unit/%.c $(O)/liblifeboat.a | $(B)/.deps-unit
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(ALL_CFLAGS) -MF $@.d -o $@ $< $(filter %.o,$^) $(O)/liblifeboat.a -lcmocka $(ALL_LIBS)
# what the CLI prints
$(O)/tests/unit/test_evac_view: $(filter-out %/main.o,$(CLI_OBJ))
$(O)/tests/integration/%: tests/integration/%.c $(O)/liblifeboat.a | $(B)/.deps-unit
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(ALL_CFLAGS) -MF $@.d -o $@ $< $(O)/liblifeboat.a -lcmocka $(ALL_LIBS)
$(O)/tests/tools/%: tests/tools/%.c | $(B)/.deps-build
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) -std=c11 -D_GNU_SOURCE $(WARN) $(CFLAGS) -MMD -MP -MF $@.d -o $@ $< -pthread -lm

# ---- tests. Everything slow to make (guest, Debian 13 tree, vectors) is made once under build/.
GUEST    := $(B)/guest/initrd.img
TINY     := $(B)/guest/tiny.elf
TRIXIE   := $(B)/trixie/qemu-system-x86_64
VECTORS  := $(B)/vectors/noise.txt
RDMA_BED := $(B)/rdma/initrd.img
UNIT_T   := $(wildcard tests/unit/*.t)
E2E_T    := $(wildcard tests/e2e/*.t)
PROVE    := prove --timer --merge --failures --comments --exec tests/lib/tap.sh
# Two at a time: they wait more than they compute. What takes longest begins first, or it would end alone.
PROVE2   := $(PROVE) -j2
first     = $(foreach n,$(2),$(filter %/$(n),$(1))) $(filter-out $(addprefix %/,$(2)),$(1))
LONG     := test_migrate_fake test_bulk test_remus_fake test_ckpt_restore test_qemu_lazy test_qemu_overlay test_disk_qemu test_qemu_protect \
	test_witness test_stage 17_evacuate.t 04_kill.t 05_badinput.t 11_checkpoint.t 03_machines.t 02_marathon.t
SAN_BIN  := $(UNIT_BIN) $(addprefix $(O)/tests/integration/,test_migrate_fake test_ckpt_fake test_ckpt_restore_fake)
export LB_BUILD := $(CURDIR)/$(O)
export LIFEBOAT_PLUGIN_DIR := $(CURDIR)/$(O)
export LB_GUEST := $(CURDIR)/$(B)/guest
export LB_RDMA := $(CURDIR)/$(B)/rdma
export CMOCKA_MESSAGE_OUTPUT := TAP
export PYTHONDONTWRITEBYTECODE := 1
export ASAN_OPTIONS := allocator_may_return_null=1:detect_leaks=1
export TSAN_OPTIONS := allocator_may_return_null=1

deps-%:
	$(Q)tests/lib/deps.sh $*
$(GUEST): tests/guest/build.sh tests/guest/init tests/guest/lbguest.c tests/lib/kernel.sh
	$(call say,GUEST,$@)
	$(Q)tests/guest/build.sh $(B)/guest && touch $@
$(TINY): tests/guest/tiny.c tests/guest/tiny_start.S tests/guest/tiny.ld
	$(call say,GUEST,$@)
	$(Q)mkdir -p $(@D) && $(CC) -m32 -std=c11 -O2 $(WARN) -ffreestanding -fno-pic -fno-stack-protector -fno-asynchronous-unwind-tables \
		-mgeneral-regs-only -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-T,tests/guest/tiny.ld -o $@ $(filter-out %.ld,$^)
$(TRIXIE): tests/trixie/build.sh
	$(call say,DEBIAN13,$@)
	$(Q)tests/trixie/build.sh $(B)/trixie && touch $@
$(VECTORS): tests/unit/noise_vectors.sh
	$(call say,VECTORS,$@)
	$(Q)tests/unit/noise_vectors.sh $(B)/vectors && touch $@

$(RDMA_BED): tests/rdma/build.sh tests/rdma/init tests/lib/kernel.sh | $(GUEST)
	$(call say,MACHINE,$@)
	$(Q)tests/rdma/build.sh $(B)/guest $(B)/rdma && touch $@

unit: $(UNIT_BIN)
integration: $(INTG_BIN)
tools: $(TOOL_BIN)
guest: $(GUEST) $(TINY)
downloads: $(GUEST) $(TRIXIE) $(VECTORS)

# The order matters on a fresh machine: packages before the first pkg-config.
check: deps-check
	$(Q)$(MAKE) --no-print-directory check-all
check-all: check-lint check-unit check-fuzz check-integration check-softdirty check-e2e
check-lint:
	$(Q)$(PROVE) tests/lint/*.sh
check-unit: all unit $(VECTORS)
	$(Q)$(PROVE2) $(call first,$(UNIT_BIN) $(UNIT_T),$(LONG))
check-integration: all integration $(GUEST)
	$(Q)$(PROVE2) $(call first,$(INTG_BIN),$(LONG))
check-e2e: all tools $(GUEST) $(TINY) $(TRIXIE)
	$(Q)$(PROVE2) $(call first,$(if $(T),$(wildcard tests/e2e/*$(T)*),$(E2E_T)),$(LONG))
check-softdirty: all $(GUEST)
	$(Q)$(PROVE) tests/softdirty/run.sh
check-fuzz: $(O)/liblifeboat.a
	$(Q)tests/fuzz/replay.sh $(O)
# Unit and engine tests under a sanitizer: SAN=address,undefined (default) or thread
check-san:
	$(Q)$(MAKE) --no-print-directory SAN=$(or $(SAN),address$(comma)undefined) CFLAGS="-O1 -g" check-san-run
check-san-run: $(SAN_BIN) $(VECTORS)
	$(Q)$(PROVE2) $(call first,$(SAN_BIN),$(LONG))

# RDMA between two machines: real ones where there is a device, else virtual ones with soft-RoCE
check-rdma: deps-rdma
	$(Q)$(MAKE) --no-print-directory check-rdma-run
check-rdma-run: all $(O)/tests/integration/test_rdma $(GUEST) $(TINY) $(RDMA_BED)
	$(Q)$(PROVE) tests/rdma/*.t

demo: deps-demo
	$(Q)$(MAKE) --no-print-directory demo-run
demo-run: all tools $(GUEST) $(TINY)
	$(Q)tests/demo/demo.py
bench-migrate: deps-bench
	$(Q)$(MAKE) --no-print-directory bench-migrate-run
bench-migrate-run: all tools $(GUEST)
	$(Q)tests/bench/bench_migrate.py $(BENCH_ARGS)
bench-remus: deps-bench
	$(Q)$(MAKE) --no-print-directory bench-remus-run
bench-remus-run: all tools $(GUEST)
	$(Q)tests/bench/bench_remus.py $(BENCH_ARGS)
bench-checkpoint: deps-bench
	$(Q)$(MAKE) --no-print-directory bench-checkpoint-run
bench-checkpoint-run: all tools $(GUEST)
	$(Q)tests/bench/bench_checkpoint.py $(BENCH_ARGS)
bench-evacuate: deps-bench
	$(Q)$(MAKE) --no-print-directory bench-evacuate-run
bench-evacuate-run: all tools $(GUEST) $(TINY)
	$(Q)tests/bench/bench_evacuate.py $(BENCH_ARGS)
bench-rdma: deps-rdma
	$(Q)$(MAKE) --no-print-directory bench-rdma-run
bench-rdma-run: all $(GUEST) $(TINY) $(RDMA_BED)
	$(Q)tests/rdma/bench.py $(BENCH_ARGS)
# What an epoch costs, without a guest
bench-stage: $(O)/tests/bench/bench_stage
	$(Q)$(O)/tests/bench/bench_stage $(BENCH_ARGS)
# What writing a checkpoint costs, without a guest
bench-store: $(O)/tests/bench/bench_store
	$(Q)mkdir -p $(O)/bench && $(O)/tests/bench/bench_store $(O)/bench $(BENCH_ARGS)
$(O)/tests/bench/%: tests/bench/%.c $(O)/liblifeboat.a
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(ALL_CFLAGS) -MF $@.d -o $@ $< $(O)/liblifeboat.a $(ALL_LIBS)

# ---- install
BINDIR   := $(PREFIX)/sbin
LIBDIR   := $(PREFIX)/lib/lifeboat
MANDIR   := $(PREFIX)/share/man
UNITDIR  := $(PREFIX)/lib/systemd/system
COMPDIR  := $(PREFIX)/share/bash-completion/completions
install: all
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR) $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man5 $(DESTDIR)$(MANDIR)/man8 \
		$(DESTDIR)$(UNITDIR) $(DESTDIR)$(COMPDIR)
	install -m 755 $(O)/lifeboat $(O)/lifeboatd $(DESTDIR)$(BINDIR)
	install -m 644 $(PLUGIN) $(DESTDIR)$(LIBDIR)
	install -m 644 cmd/cli/*.1 $(DESTDIR)$(MANDIR)/man1
	install -m 644 cmd/daemon/*.5 $(DESTDIR)$(MANDIR)/man5
	install -m 644 cmd/daemon/*.8 $(DESTDIR)$(MANDIR)/man8
	install -m 644 cmd/daemon/*.service $(DESTDIR)$(UNITDIR)
	sed -i 's,/usr/local/sbin,$(BINDIR),' $(DESTDIR)$(UNITDIR)/lifeboatd.service $(DESTDIR)$(UNITDIR)/lifeboat-suspend.service
	for u in session-.scope machine-.scope user@.service; do \
		install -D -m 644 cmd/daemon/stops-after-suspend.conf $(DESTDIR)$(UNITDIR)/$$u.d/lifeboat.conf; done
	install -m 644 cmd/cli/lifeboat.bash-completion $(DESTDIR)$(COMPDIR)/lifeboat
uninstall:
	rm -rf $(DESTDIR)$(LIBDIR)
	rm -f $(addprefix $(DESTDIR)$(BINDIR)/,lifeboat lifeboatd) $(DESTDIR)$(COMPDIR)/lifeboat \
		$(patsubst cmd/cli/%,$(DESTDIR)$(MANDIR)/man1/%,$(wildcard cmd/cli/*.1)) \
		$(patsubst cmd/daemon/%,$(DESTDIR)$(MANDIR)/man5/%,$(wildcard cmd/daemon/*.5)) \
		$(patsubst cmd/daemon/%,$(DESTDIR)$(MANDIR)/man8/%,$(wildcard cmd/daemon/*.8)) \
		$(patsubst cmd/daemon/%,$(DESTDIR)$(UNITDIR)/%,$(wildcard cmd/daemon/*.service)) \
		$(patsubst %,$(DESTDIR)$(UNITDIR)/%.d/lifeboat.conf,session-.scope machine-.scope user@.service)

format:
	clang-format -i $(LIB_SRC) $(CLI_SRC) $(DMN_SRC) $(CMN_SRC)
clean:
	$(Q)rm -rf $(B)/obj $(B)/gen $(B)/lifeboat $(B)/lifeboatd $(B)/liblifeboat.a $(B)/*.so $(B)/san-* $(B)/tests
help:
	@echo "all            build/lifeboat and build/lifeboatd"
	@echo "deps-build     (root) install what all needs"
	@echo "demo           (root) migrate a real VM between hosts in namespaces, protect it, kill its host, empty another; a client watches"
	@echo "check          (root) install what is missing, run every test"
	@echo "check-unit     unit tests, no root"
	@echo "check-lint check-fuzz check-integration check-softdirty check-e2e [T=name]   one group"
	@echo "check-rdma     (root) the RDMA transport, over a device or soft-RoCE in virtual machines; not part of check"
	@echo "check-san      unit and engine tests with SAN=address,undefined (default) or SAN=thread"
	@echo "bench-migrate  (root) Lifeboat and QEMU's own migration side by side [BENCH_ARGS=--quick]"
	@echo "bench-remus    (root) cost of protection, failovers [BENCH_ARGS='--failovers 10' | '--no-cost --soak 30']"
	@echo "bench-checkpoint  (root) suspend, resume, live checkpoints beside QEMU's migrate to a file and savevm [BENCH_ARGS='--size 256 --runs 1']"
	@echo "bench-evacuate (root) a host of a hundred VMs is emptied, at the planned and at fixed concurrency [BENCH_ARGS='--vms 20 --runs 1']"
	@echo "bench-rdma     (root) what TCP, RDMA with buffers and zero copy cost: bytes copied, processor time [BENCH_ARGS='--runs 1 --size 48']"
	@echo "bench-stage    microseconds per page and bytes on the wire of an epoch [BENCH_ARGS='EPOCHS PAGES']"
	@echo "bench-store    megabytes per second of writing a checkpoint [BENCH_ARGS='MIB THREADS']"
	@echo "install        DESTDIR= PREFIX=/usr/local; uninstall removes what it put there"
	@echo "clean          everything but the guest, the Debian 13 tree and the vectors"

.PHONY: all unit integration tools guest downloads check check-all check-lint check-unit check-integration check-e2e \
	check-softdirty check-fuzz check-san check-san-run demo demo-run bench-migrate bench-migrate-run bench-remus bench-remus-run bench-checkpoint bench-checkpoint-run bench-evacuate bench-evacuate-run bench-rdma bench-rdma-run \
	bench-stage bench-store \
	install uninstall format clean help
.SECONDARY:
-include $(shell find $(O)/obj $(O)/tests -type f -name '*.d' 2>/dev/null)
