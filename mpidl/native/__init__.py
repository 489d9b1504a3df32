"""The C library as Python sees it: how it is loaded, and one call for each function; the only user of cffi."""
