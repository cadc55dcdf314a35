/*
 * core/qemu/pm_defs.h - kernel interface of Linux 6.7, for older headers.
 *
 * userfaultfd in asynchronous write-protect mode and the PAGEMAP_SCAN ioctl, as
 * documented in the kernel's admin-guide/mm/{userfaultfd,pagemap}.rst.
 */
#ifndef LB_PM_DEFS_H
#define LB_PM_DEFS_H

#include <linux/ioctl.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>

#define LB_UFFD_USER_MODE_ONLY 1
#define LB_UFFD_FEATURE_PAGEFAULT_FLAG_WP (UINT64_C(1) << 0)
#define LB_UFFD_FEATURE_WP_HUGETLBFS_SHMEM (UINT64_C(1) << 12)
#define LB_UFFD_FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#define LB_UFFD_FEATURE_WP_ASYNC (UINT64_C(1) << 15)
#define LB_UFFD_FEATURES                                                                          \
    (LB_UFFD_FEATURE_PAGEFAULT_FLAG_WP | LB_UFFD_FEATURE_WP_HUGETLBFS_SHMEM |                     \
     LB_UFFD_FEATURE_WP_UNPOPULATED | LB_UFFD_FEATURE_WP_ASYNC)

#define LB_PAGE_IS_WRITTEN (UINT64_C(1) << 1)
#define LB_PAGE_IS_PRESENT (UINT64_C(1) << 3)
#define LB_PAGE_IS_SWAPPED (UINT64_C(1) << 4)
#define LB_PAGE_IS_PFNZERO (UINT64_C(1) << 5)

#define LB_PM_SCAN_WP_MATCHING (UINT64_C(1) << 0)
#define LB_PM_SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)

struct lb_page_region {
    __u64 start, end, categories;
};
struct lb_pm_scan_arg {
    __u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
    __u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define LB_PAGEMAP_SCAN _IOWR('f', 16, struct lb_pm_scan_arg)

/* words of /proc/PID/pagemap */
#define LB_PM_SOFT_DIRTY (UINT64_C(1) << 55)
#define LB_PM_EXCLUSIVE (UINT64_C(1) << 56)
#define LB_PM_SWAP (UINT64_C(1) << 62)
#define LB_PM_PRESENT (UINT64_C(1) << 63)

#endif
