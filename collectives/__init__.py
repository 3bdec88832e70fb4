"""Collectives over compressed payloads; none of them knows a compressor by name."""

if __name__ != "gck.collectives":
    raise ImportError(f"import gck.collectives, not {__name__}: this folder belongs to the package gck")
