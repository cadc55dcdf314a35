/* The guest of test_qemu_kvm.c: the first bytes of a 64 KiB ROM that starts in real mode at
 * 0xf0000.  It asks KVM for its paravirtual clock at 0x10000, then, for ever: writes a counter to
 * the first word of 32 pages (0x20000..0x3f000) and its time stamp counter to 0x10800.
 * test_qemu_kvm.c holds the assembled bytes:
 *   as --32 -o r.o kvmrom.S && objcopy -O binary r.o r.bin */
        .code16
        cli
        mov     $0x4b564d01, %ecx       /* MSR_KVM_SYSTEM_TIME_NEW */
        mov     $0x00010001, %eax       /* address | enable */
        xor     %edx, %edx
        wrmsr
        xor     %ebx, %ebx
round:
        inc     %ebx
        mov     $0x2000, %ax
page:
        mov     %ax, %ds
        mov     %ebx, %ds:0
        add     $0x100, %ax
        cmp     $0x4000, %ax
        jb      page
        mov     $0x1000, %ax
        mov     %ax, %ds
        rdtsc
        mov     %eax, %ds:0x800
        mov     %edx, %ds:0x804
        jmp     round
