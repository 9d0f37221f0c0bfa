"""Imported first by a command, whose process is its own: PyTorch is loaded with its threads prepared."""

from m2rec.threads import configure_threads

configure_threads()
