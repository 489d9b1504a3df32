"""What cffi is told of the C library: the declarations of csrc/include/*.h, which the library carries in itself."""

from __future__ import annotations

import re

_LEFT_OUT = re.compile(
    r"/\*.*?\*/"  # comments
    r"|^[ \t]*#[ \t]*ifdef __cplusplus.*?^[ \t]*#[ \t]*endif"  # what is for C++ alone
    r"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"  # other lines of the preprocessor, continued ones too
    r"|\bMPIDL_API\b",
    re.DOTALL | re.MULTILINE,
)


def declarations(headers: str) -> str:
    """Returns the declarations of header files as `cffi.FFI.cdef` takes them.

    Args:
        headers: the text of one or several files, one after the other. Beside comments, include guards, macros and
            `MPIDL_API` they hold nothing but C declarations.
    """
    kept = _LEFT_OUT.sub("", headers)
    return "\n".join(line.rstrip() for line in kept.splitlines() if line.strip())
