"""Kernels for GPUs. Nothing here knows of ranks or of engines, and each module is imported where its kernels run."""
