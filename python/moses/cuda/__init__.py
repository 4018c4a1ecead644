"""The CUDA kernels: compiled by NVRTC at first use, cached, and launched through the driver API on torch's current stream.

    compile.py   source -> cubin for one architecture, in the user's cache
    launch.py    cubin -> module of a device; a kernel on the current stream
    kernels.py   the ops of `moses.ops` by kernels

Where they cannot be had (no NVRTC, no driver, an older GPU), plain torch serves and one warning says why.
"""

from __future__ import annotations
