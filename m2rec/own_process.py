"""Imported first by a command, whose process is its own: PyTorch is loaded with its threads prepared."""

from m2rec.threads import prepare_process

prepare_process()
