"""llama.cpp's own server from the package xllamacpp, with those flags of llama-server that a race needs.

    python -m venv peer && peer/bin/pip install xllamacpp==2026.10.11549
    peer/bin/python benchmarks/load/llama_server.py --model FILE --port 8101 --parallel 32 --ctx-size 16384

The package has llama.cpp's C++ server in a wheel, so nothing has to be compiled. On x86-64 it uses AVX2, FMA, F16C and
BMI2, and no AVX-512. It needs nothing of ours and runs in the peer's environment.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags; their defaults are llama-server's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=-1)
    parser.add_argument("--threads-batch", type=int, default=-1)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--cont-batching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache-prompt", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache-ram", type=int, default=8192)
    parser.add_argument("--flash-attn", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--load-mode", choices=("none", "mmap"), default="mmap")
    parser.add_argument("--samplers", default="penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--log-verbosity", type=int, default=3)
    return parser.parse_args(arguments)


def main() -> None:
    """Serve until a signal ends it."""
    args = parse(sys.argv[1:])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.hostnames, params.port = [args.host], args.port
    params.cpuparams.n_threads, params.cpuparams_batch.n_threads = args.threads, args.threads_batch
    params.n_parallel, params.n_ctx = args.parallel, args.ctx_size
    params.cont_batching, params.cache_prompt = args.cont_batching, args.cache_prompt
    params.cache_ram_mib = args.cache_ram
    names = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}
    params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{names[args.flash_attn]}"]
    params.load_mode = xllamacpp.llama_load_mode[f"LLAMA_LOAD_MODE_{args.load_mode.upper()}"]
    params.sampling.samplers, params.sampling.top_k = args.samplers, args.top_k
    params.verbosity = args.log_verbosity
    print(xllamacpp.get_system_info(), file=sys.stderr)
    _server = xllamacpp.Server(params)  # it loads the model and listens in threads of its own
    signal.pause()


if __name__ == "__main__":
    main()
