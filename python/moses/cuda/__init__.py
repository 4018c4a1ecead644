"""The CUDA kernels: compiled by NVRTC at first use, cached, and launched through the driver API on torch's current stream.

    names.py     the kernels by name
    compile.py   source -> cubin for one architecture, in the user's cache
    launch.py    cubin -> functions of a device; a kernel on the current stream
    kernels.py   the ops of `moses.plan` and `moses.ops` by kernels

Where they cannot be had (no NVRTC, no driver's bindings, an architecture that NVRTC does not know), plain torch serves and one warning
says why. An index out of range is an asynchronous assert of the device, as torch's own: its message goes to stderr, and the next call that
waits raises.
"""

from __future__ import annotations
