"""Kernel interfaces that ask user space for missing bytes of a file: protocols and engines."""
