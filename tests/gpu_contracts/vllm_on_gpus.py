"""What vLLM makes of command lines on a machine with GPUs.

usage: vllm_on_gpus.py < a JSON list of command lines (the words behind the module's name)

Prints one JSON line for each: {"says": facts of vLLM's configuration, and flags that its configuration does not hold}
or {"refuses": why}.
"""

from __future__ import annotations

import json
import sys

import pretended_gpus  # noqa: F401
import vllm
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser


class Parser(FlexibleArgumentParser):
    def error(self, message: str) -> None:  # instead of an exit
        raise ValueError(message)


def says(words: list[str]) -> dict:
    arguments = make_arg_parser(Parser()).parse_args(words)
    validate_parsed_serve_args(arguments)
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    return {
        "version": vllm.__version__.split("+")[0],
        "file": vllm.__file__,
        "platform": type(current_platform).__base__.__name__,
        "model": model.model,
        "served_as": model.served_model_name,
        "dtype": str(model.dtype),
        "seed": model.seed,
        "longest": model.max_model_len,
        "logprobs": model.logprobs_mode,
        "tokenizer": not model.skip_tokenizer_init,
        "sleeps": model.enable_sleep_mode,
        "transfer": config.weight_transfer_config.backend,
        "quantization": [
            model.quantization,
            str(config.quant_config and config.quant_config.args.linear.weight),
            config.quant_config and config.quant_config.args.ignore,
            config.kernel_config.moe_backend,
        ],
        "batch_invariant": envs.VLLM_BATCH_INVARIANT,
        "routed_experts": config.aux_output_config.enable_return_routed_experts,
        "v2_runner": config.use_v2_model_runner,
        "workers": parallel.world_size_across_dp,
        "extension": parallel.worker_extension_cls,
        "sequences": config.scheduler_config.max_num_seqs,
        "prefix_cache": config.cache_config.enable_prefix_caching,
        "states": [
            config.cache_config.mamba_cache_mode,
            config.cache_config.mamba_ssm_cache_dtype,
            config.scheduler_config.enable_chunked_prefill,
        ],
        "memory": config.cache_config.gpu_memory_utilization,
        "eager": model.enforce_eager,
        "middleware": arguments.middleware,
        "scale_out": arguments.enable_scale_out,
        "address": [arguments.host, arguments.port],
    }


for words in json.load(sys.stdin):
    try:
        line = {"says": says(words)}
    except (ValueError, SystemExit) as error:  # pydantic's faults are ValueErrors
        line = {"refuses": str(error)}
    print("VLLM " + json.dumps(line), flush=True)
