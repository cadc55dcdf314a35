/* core/core_internal.h - shared by the .c files of core/ only. */
#ifndef LB_CORE_INTERNAL_H
#define LB_CORE_INTERNAL_H

#include "core/core.h"

/* The code that fits a failed system call on a file. */
enum lb_errcode lb_errcode_of_errno(int sys_errno);

#endif
