/* The guest of test_qemu_*.c: a boot sector that, with interrupts off, writes a
 * counter to the first word of 32 pages (0x20000..0x3f000), round and round, and
 * nothing else.  qemu_util.h holds the assembled bytes:
 *   as --32 -o b.o bootsec.S && objcopy -O binary b.o b.bin */
        .code16
        cli
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
        mov     $20000, %ecx
delay:
        dec     %ecx
        jnz     delay
        jmp     round
