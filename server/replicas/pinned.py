"""Starts a command bound to cores and to their memory, and ends it with its parent. Run as a program.

    python pinned.py PARENT CORES NODE COMMAND...

PARENT is the process id of the parent, CORES a list such as 0,1,2 or -, and NODE the number of a memory node or -.
It imports only the standard library, so that it costs nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys

PR_SET_PDEATHSIG, MPOL_PREFERRED = 1, 1
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # numbers of the system call
MAX_NODES = 1024


def main() -> None:
    """Bind this process, and become the command."""
    parent, cores, node, *command = sys.argv[1:]
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before it could be watched
            os._exit(1)
        if cores != "-":
            os.sched_setaffinity(0, map(int, cores.split(",")))
        if node != "-" and platform.machine() in SET_MEMPOLICY:
            # Preferred, not bound: when that memory is full, the next one is better than an end.
            mask = (ctypes.c_ulong * (MAX_NODES // 64))()
            mask[int(node) // 64] = 1 << int(node) % 64
            library.syscall(SET_MEMPOLICY[platform.machine()], MPOL_PREFERRED, mask, MAX_NODES)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
