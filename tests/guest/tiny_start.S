/* Where tiny.c begins and what interrupts it: no paging, flat segments, one stack. */
    .set FLAGS, 2 /* tell me how much memory there is */
    .section .multiboot, "a"
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)

    .text
    .globl start, wake_entry, nmi_entry, trap_entry
start:
    cli
    cld
    mov $stack_top, %esp
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $16, %ecx
    mov %ecx, %ds
    mov %ecx, %es
    mov %ecx, %ss
    push %ebx /* multiboot information */
    push %eax
    call tiny_main

/* The timer: counted, acknowledged to the local APIC. */
wake_entry:
    incl wakes
    movl $0, 0xfee000b0
    iret
/* Somebody outside wants all memory checked now. */
nmi_entry:
    incl nmis
    iret
/* An exception: this guest has none, so its memory or processor is damaged. */
trap_entry:
    cli
    call trapped

    .section .rodata
    .align 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .bss
    .align 16
    .skip 8192
stack_top:
    .section .note.GNU-stack, "", @progbits
