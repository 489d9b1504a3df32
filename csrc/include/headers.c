/* The text of the headers beside this file, in the library that they describe: mpidl/native/library.py reads its
 * declarations there, so that a call is made as the loaded library was compiled, and none is written down twice.
 *
 * The assembler copies the files. MPIDL_HEADERS is their folder, seen from where the compiler is started.
 */
__asm__(".section .rodata\n"
        ".global mpidl_headers\n"
        ".type mpidl_headers, %object\n"
        "mpidl_headers:\n"
        ".incbin \"" MPIDL_HEADERS "/mpidl.h\"\n"
        ".incbin \"" MPIDL_HEADERS "/mpidl_node.h\"\n"
        ".incbin \"" MPIDL_HEADERS "/mpidl_center.h\"\n"
        ".incbin \"" MPIDL_HEADERS "/mpidl_cuda.h\"\n"
        ".byte 0\n"
        ".size mpidl_headers, . - mpidl_headers\n"
        ".text\n");
