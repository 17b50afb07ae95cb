"""Lazy mounting of EROFS and RAFS v6 images."""

__version__ = "0.1.0"
